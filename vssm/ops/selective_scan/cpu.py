"""The selective scan on the native CPU kernels; `op.py` registers it for CPU tensors if they loaded.

Letters: B batch, D channels, L steps, N states, G groups of B and C.
"""

from __future__ import annotations

import torch

from .. import native
from . import portable
from .chunks import chunk_length, num_chunks


def takes(u, delta, A, B, C, D, z, delta_bias) -> bool:
    """The kernels take one dtype of at most 32 bits for the sequences, float32 parameters and at most 256 states."""
    sequences = {x.dtype for x in (u, delta, B, C, z) if x is not None}
    parameters = {x.dtype for x in (A, D, delta_bias) if x is not None}
    return (
        len(sequences) == 1
        and u.dtype in native.DTYPES
        and parameters == {torch.float32}
        and A.shape[1] <= native.MAX_STATES
    )


def _sizes(u, A, B) -> tuple[int, ...]:
    return *u.shape, A.shape[1], B.shape[1], chunk_length(u.shape[2]), torch.get_num_threads()


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """`vssm::selective_scan_forward`: out (B, D, L), last state (B, D, N), chunk states (B, D, chunks, N)."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not takes(*inputs):
        return portable.selective_scan_forward(*inputs, delta_softplus)
    batch, channels, length = u.shape
    # Sizes as one tuple: MONAI's MetaTensor has a new_empty that takes nothing else.
    out, last_state = torch.empty_like(u), A.new_empty((batch, channels, A.shape[1]))
    chunk_states = A.new_empty((batch, channels, num_chunks(length), A.shape[1]))
    native.library.vssm_selective_scan_forward(
        native.DTYPES[u.dtype],
        *map(native.address, inputs),
        delta_softplus,
        *map(native.address, (out, last_state, chunk_states)),
        *_sizes(u, A, B),
    )
    return out, last_state, chunk_states


def backward(grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus):
    """`vssm::selective_scan_backward`: gradients in the order of the inputs, empty for absent ones."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not takes(*inputs):
        return portable.selective_scan_backward(grad_out, grad_last_state, *inputs, chunk_states, delta_softplus)
    gradients = [torch.empty_like(x) if x is not None else None for x in inputs]
    sizes = _sizes(u, A, B)
    workspace = A.new_empty((native.library.vssm_selective_scan_backward_workspace(*sizes),))
    native.library.vssm_selective_scan_backward(
        native.DTYPES[u.dtype],
        *map(native.address, (grad_out, grad_last_state, *inputs, chunk_states)),
        delta_softplus,
        *map(native.address, (*gradients, workspace)),
        *sizes,
    )
    return tuple(u.new_empty((0,)) if x is None else x for x in gradients)
