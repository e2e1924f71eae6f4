"""The selective scan as an ONNX graph can hold it: ONNX's Scan operator, twice, whatever the length.

The form is that of `portable.py`, with its two loops as operators: all chunks walk their steps side by side, then a
state is carried from chunk to chunk. Used while torch.onnx exports, for inference.

Letters: B batch, D channels, N states, G groups of B and C, P channels of a group, S chunks, T steps of one.
"""

from __future__ import annotations

import torch

# PyTorch's loop that torch.onnx turns into ONNX's Scan; torch.export has no public name for it yet.
from torch._higher_order_ops.scan import scan

from .chunks import chunk_length
from .portable import Chunked, skip_and_gate


def selective_scan_onnx(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """out (B, D, L) in u's dtype and the last state (B, D, N), as `selective_scan_forward` of `portable.py`."""
    c = Chunked(u, delta, A, B, C, delta_bias, delta_softplus, chunk_length(u.shape[2]))

    # Shapes do not broadcast in here: torch.onnx lets sizes be symbols, and two symbols only match as equals.
    def step(state, now):
        decay, drive = now
        state = decay * state + drive
        # A copy: what a step gives out must not be what it carries on.
        return state, state.clone()

    # Not `c.decay`: ONNX has an operator for the exponential, but none for powers of two.
    def decay(dt):
        return torch.exp(dt.unsqueeze(-5) * c.A)

    zero = c.zero_state()

    # Copies: `contiguous` keeps the strides of sides of length 1, and torch.onnx compares all strides.
    def plain(x):
        return x.clone(memory_format=torch.contiguous_format)

    ends, states = scan(step, zero, (plain(decay(c.dt)), plain(c.dt_u.unsqueeze(1) * c.B)))
    chunks = (decay(c.dt.sum(0)), ends)
    last, after = scan(step, plain(zero[:, :, 0]), tuple(plain(x.movedim(2, 0)) for x in chunks))
    starts = torch.cat([torch.zeros_like(after[:1]), after[:-1]]).movedim(0, 2)
    y = (c.C * (states + decay(c.dt.cumsum(0)) * starts)).sum(1)
    return skip_and_gate(c.join(y), u, D, z), last.flatten(2).permute(1, 2, 0)
