"""The scan along routes on the native CPU kernels; `op.py` registers it for CPU tensors if they loaded.

Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt, S chunks.
"""

from __future__ import annotations

import torch

from .. import native
from ..selective_scan.chunks import chunk_length, num_chunks
from . import portable


def _takes(x, dt_b_c, A, D, delta_bias) -> bool:
    """The kernels take one dtype of at most 32 bits for x and dt_b_c, float32 parameters and at most 256 states."""
    parameters = {t.dtype for t in (A, D, delta_bias) if t is not None}
    return (
        x.dtype == dt_b_c.dtype
        and x.dtype in native.DTYPES
        and parameters == {torch.float32}
        and A.shape[2] <= native.MAX_STATES
    )


def _sizes(x, dt_weight, A, order) -> tuple[int, ...]:
    routes, channels, states = A.shape
    length = order.shape[1]
    positions = (*x.shape[:2], channels, routes, length, states)
    return *positions, dt_weight.shape[2], x.ndim == 4, chunk_length(length), torch.get_num_threads()


def forward(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus):
    """`vssm::cross_selective_scan_forward`: y like x, chunk states (B, K, D, S, N)."""
    if not _takes(x, dt_b_c, A, D, delta_bias):
        return portable.cross_selective_scan_forward(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus)
    dt_weight = dt_weight.float()
    dtype, sizes = native.DTYPES[x.dtype], _sizes(x, dt_weight, A, order)
    y = torch.empty_like(x)
    chunk_states = A.new_empty((x.shape[0], *A.shape[:2], num_chunks(order.shape[1]), A.shape[2]))
    workspace = A.new_empty((native.library.vssm_cross_scan_forward_workspace(dtype, *sizes),))
    native.library.vssm_cross_scan_forward(
        dtype,
        *map(native.address, (x, dt_b_c, dt_weight, A, order, D, delta_bias)),
        delta_softplus,
        *map(native.address, (y, chunk_states, workspace)),
        *sizes,
    )
    return y, chunk_states


def backward(grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus):
    """`vssm::cross_selective_scan_backward`: gradients in the order of the inputs, empty for absent ones."""
    if not _takes(x, dt_b_c, A, D, delta_bias):
        return portable.cross_selective_scan_backward(
            grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus
        )
    weight = dt_weight.float()
    dtype, sizes = native.DTYPES[x.dtype], _sizes(x, weight, A, order)
    gradients = [None if t is None else torch.empty_like(t) for t in (x, dt_b_c, weight, A, D, delta_bias)]
    workspace = A.new_empty((native.library.vssm_cross_scan_backward_workspace(dtype, *sizes),))
    native.library.vssm_cross_scan_backward(
        dtype,
        *map(native.address, (grad_y, x, dt_b_c, weight, A, order, D, delta_bias, chunk_states)),
        delta_softplus,
        *map(native.address, (*gradients, workspace)),
        *sizes,
    )
    gradients[2] = gradients[2].to(dt_weight.dtype)
    return tuple(A.new_empty((0,)) if t is None else t for t in gradients)
