"""Mamba-2's scan on the native CPU kernels; `op.py` registers it for CPU tensors if they loaded.

Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states.
"""

from __future__ import annotations

import torch

from .. import native
from . import portable

# With more states than this, PyTorch's matrix products walk back as fast as the recurrence.
_BACKWARD_STATES = 64


def _takes(max_states, x, dt, A, B, C, D, z, dt_bias, initial_states) -> bool:
    """The kernels take one dtype of at most 32 bits for the sequences, float32 parameters and so many states."""
    sequences = {t.dtype for t in (x, B, C, z) if t is not None}
    parameters = {t.dtype for t in (A, D, dt_bias, initial_states) if t is not None}
    return (
        len(sequences) == 1
        and x.dtype in native.DTYPES
        and dt.dtype != torch.float64
        and parameters == {torch.float32}
        and B.shape[3] <= max_states
    )


def _by_head(dt, A, dt_bias, settings):
    """Step sizes and decays (B, H, L) and what they multiply: float32, contiguous."""
    sizes = portable.step_sizes(dt.float(), dt_bias, *settings).transpose(1, 2).contiguous()
    return sizes, (sizes * A[:, None]).exp()


def _sizes(x, B) -> tuple[int, ...]:
    return *x.shape, *B.shape[2:], torch.get_num_threads()


def forward(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, chunk_size):
    """`vssm::ssd_forward`: out (B, L, H, P), final states (B, H, P, N). The kernel has no use for chunk_size."""
    inputs, settings = (x, dt, A, B, C, D, z, dt_bias, initial_states), (dt_softplus, dt_min, dt_max)
    if not _takes(native.MAX_STATES, *inputs):
        return portable.ssd_forward(*inputs, *settings, chunk_size)
    step_sizes, decay = _by_head(dt, A, dt_bias, settings)
    skip = portable.skip_weights(D, x)
    batch, _, heads, width = x.shape
    out, final_states = torch.empty_like(x), A.new_empty((batch, heads, width, B.shape[3]))
    native.library.vssm_ssd_forward(
        native.DTYPES[x.dtype],
        *map(native.address, (x, step_sizes, decay, B, C, skip, z, initial_states, out, final_states)),
        *_sizes(x, B),
    )
    return out, final_states


def backward(
    grad_out,
    grad_final_states,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_states,
    dt_softplus,
    dt_min,
    dt_max,
    chunk_size,
):
    """`vssm::ssd_backward`: gradients in the order of the inputs, empty for absent ones."""
    inputs, settings = (x, dt, A, B, C, D, z, dt_bias, initial_states), (dt_softplus, dt_min, dt_max)
    if not _takes(_BACKWARD_STATES, *inputs):
        return portable.ssd_backward(grad_out, grad_final_states, *inputs, *settings, chunk_size)
    step_sizes, decay = _by_head(dt, A, dt_bias, settings)
    skip = portable.skip_weights(D, x)
    dx, dB, dC = torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
    dsizes, dlog_decay = torch.empty_like(step_sizes), torch.empty_like(step_sizes)
    dskip = None if D is None else A.new_empty((x.shape[0], *x.shape[2:]))
    dz, dinitial = (None if t is None else torch.empty_like(t) for t in (z, initial_states))
    sizes = _sizes(x, B)
    workspace = A.new_empty((native.library.vssm_ssd_backward_workspace(*sizes),))
    native.library.vssm_ssd_backward(
        native.DTYPES[x.dtype],
        *map(native.address, (grad_out, grad_final_states, x, step_sizes, decay, B, C, skip, z, initial_states)),
        *map(native.address, (dx, dsizes, dlog_decay, dB, dC, dskip, dz, dinitial, workspace)),
        *sizes,
    )
    dsizes = (dsizes + dlog_decay * A[:, None]).transpose(1, 2)
    ddt = portable.step_size_gradients(dsizes, dt, dt_bias, *settings)
    gradients = (
        dx,
        ddt.to(dt.dtype).contiguous(),
        (dlog_decay * step_sizes).sum((0, 2)),
        dB,
        dC,
        None if D is None else dskip.sum((0, 2) if D.ndim == 1 else 0),
        dz,
        None if dt_bias is None else ddt.sum((0, 1)),
        dinitial,
    )
    return tuple(x.new_empty((0,)) if t is None else t for t in gradients)
