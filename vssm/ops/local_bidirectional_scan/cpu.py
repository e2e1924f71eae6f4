"""The locally bi-directional scan on the native CPU kernels; `op.py` registers it for CPU tensors if they loaded.

Letters: B batch, D channels, L steps, N states, G groups of B and C.
"""

from __future__ import annotations

import torch

from .. import native
from ..selective_scan.chunks import chunk_length, num_chunks
from ..selective_scan.cpu import takes
from . import portable


def _takes(inputs, window) -> bool:
    """The kernels take what the selective scan's do, with windows that are powers of two up to 16, as the official."""
    return takes(*inputs) and window <= native.MAX_WINDOW and window & (window - 1) == 0


def _sizes(u, A, B, window) -> tuple[int, ...]:
    return *u.shape, A.shape[1], B.shape[1], chunk_length(u.shape[2]), window, torch.get_num_threads()


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window):
    """`vssm::local_bidirectional_scan_forward`: out (B, D, L), chunk states (B, D, chunks, N)."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not _takes(inputs, window):
        return portable.local_bidirectional_scan_forward(*inputs, delta_softplus, window)
    batch, channels, length = u.shape
    out = torch.empty_like(u)
    chunk_states = A.new_empty((batch, channels, num_chunks(length), A.shape[1]))
    native.library.vssm_local_bidirectional_scan_forward(
        native.DTYPES[u.dtype],
        *map(native.address, inputs),
        delta_softplus,
        *map(native.address, (out, chunk_states)),
        *_sizes(u, A, B, window),
    )
    return out, chunk_states


def backward(grad_out, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus, window):
    """`vssm::local_bidirectional_scan_backward`: gradients in the order of the inputs, empty for absent ones."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not _takes(inputs, window):
        return portable.local_bidirectional_scan_backward(grad_out, *inputs, chunk_states, delta_softplus, window)
    gradients = [torch.empty_like(x) if x is not None else None for x in inputs]
    *sizes, _, threads = _sizes(u, A, B, window)
    workspace = A.new_empty((native.library.vssm_selective_scan_backward_workspace(*sizes, threads),))
    native.library.vssm_local_bidirectional_scan_backward(
        native.DTYPES[u.dtype],
        *map(native.address, (grad_out, *inputs, chunk_states)),
        delta_softplus,
        *map(native.address, (*gradients, workspace)),
        *sizes,
        window,
        threads,
    )
    return tuple(u.new_empty((0,)) if x is None else x for x in gradients)
