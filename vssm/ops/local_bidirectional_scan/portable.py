"""The locally bi-directional scan in vectorised PyTorch: the portable selective scan and a walk back over each chunk.

Every chunk holds whole windows, so that all chunks walk their windows side by side, as in the selective scan. With
s[t] = r[t] + x[t] the look ahead is s[t] = a[t] * s[t+1] + x[t], a scan in reverse, of which r[t] = a[t] * s[t+1] is
used. Its adjoint runs forward within the window: with rho[t] = C[t] * g[t] + mu[t] that of r[t], the adjoint of s[t+1]
is mu[t+1] = a[t] * rho[t], and 0 at the start of a window. mu adds to the gradients of x, rho[t] * r[t] to those of
dt[t] * A. Like the states of the scan, s is recomputed in short pieces: nothing of size B*D*L*N is ever stored.

Letters: B batch, D channels, L steps, N states, G groups of B and C, P channels of a group, S chunks, T steps of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..selective_scan.chunks import chunk_length
from ..selective_scan.portable import (
    Chunked,
    Gradients,
    before_gate,
    gather,
    input_gradients,
    scan,
    scan_adjoint,
    skip_and_gate,
)
from .chunks import windowed_chunk_length


def look_ahead(c: Chunked, window: int) -> Tensor:
    """sum over n of C * r, (B, D, L)."""
    outputs = [None] * c.steps
    for step in reversed(range(c.steps)):
        if (step + 1) % window == 0:
            ahead = c.zero_state()
        r = c.decay(c.dt[step]) * ahead
        outputs[step] = (c.C[step] * r).sum(0)
        ahead = torch.addcmul(r, c.B[step], c.dt_u[step])
    return c.join(c.stack(outputs))


def look_ahead_adjoint(c: Chunked, window: int, y_grad: Tensor) -> Gradients:
    """Gradients of what `look_ahead` returns, given the gradient y_grad (B, D, L) of that."""
    gc = c.cut(y_grad)
    none = [None] * c.steps
    y, from_input, from_decay, dB, dC = none.copy(), none.copy(), none.copy(), none.copy(), none.copy()
    dA = c.zero_state()
    # Long windows are walked in pieces, of which only the states at the ends are kept.
    stride = chunk_length(window)
    for start in range(0, c.steps, window):
        pieces = [range(low, min(low + stride, start + window)) for low in range(start, start + window, stride)]
        ahead, entering = c.zero_state(), []
        for piece in reversed(pieces):
            entering.append(ahead)
            if piece.start > start:
                for step in reversed(piece):
                    ahead = c.advance(ahead, step)

        message = c.zero_state()  # mu
        for piece in pieces:
            aheads = [entering.pop()]
            for step in reversed(piece[1:]):
                aheads.append(c.advance(aheads[-1], step))
            for step in piece:
                decay = c.decay(c.dt[step])
                r = decay * aheads.pop()
                adjoint = torch.addcmul(message, c.C[step], gc[step])
                carried = adjoint * r
                y[step] = (c.C[step] * r).sum(0)
                from_input[step] = (message * c.B[step]).sum(0)
                from_decay[step] = (carried * c.A).sum(0)
                dB[step] = (message * c.dt_u[step]).sum(-1)
                dC[step] = (r * gc[step]).sum(-1)
                dA = torch.addcmul(dA, carried, c.dt[step])
                message = decay * adjoint
    return gather(c, y, from_input, from_decay, dA, dB, dC)


def local_bidirectional_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window):
    """out in u's dtype; the states h at the start of each chunk (B, D, S, N) in the accumulation dtype."""
    steps = windowed_chunk_length(u.shape[2], window)
    c = Chunked(u, delta, A, B, C, delta_bias, delta_softplus, steps)
    y, chunk_states, _ = scan(c)
    return skip_and_gate(y + look_ahead(c, window), u, D, z), chunk_states


def local_bidirectional_scan_backward(
    grad_out, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus, window
):
    """Gradients of all inputs in their dtypes; absent optional inputs give empty tensors."""
    steps = windowed_chunk_length(u.shape[2], window)
    c = Chunked(u, delta, A, B, C, delta_bias, delta_softplus, steps)
    y_grad = before_gate(grad_out, z, c.dtype)
    parts = scan_adjoint(c, y_grad, chunk_states, None), look_ahead_adjoint(c, window, y_grad)
    found = Gradients(*(x + y for x, y in zip(*parts, strict=True)))
    return input_gradients(c, found, y_grad, grad_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
