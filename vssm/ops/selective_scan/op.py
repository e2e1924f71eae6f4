"""`vssm::selective_scan_forward` and `_backward` for the PyTorch dispatcher: schema, fake, autograd, autocast.

The default body is the portable implementation, on every device; kernels register themselves for theirs.
Letters: B batch, D channels, L steps, N states, G groups of B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from ..vmap import register_vmap
from . import cpu, portable
from .chunks import num_chunks


@torch.library.custom_op("vssm::selective_scan_forward", mutates_args=())
def forward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return portable.selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@torch.library.custom_op("vssm::selective_scan_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return portable.selective_scan_backward(
        grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus
    )


@forward_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    batch, channels, length = u.shape
    states = A.shape[1]
    last_state = A.new_empty((batch, channels, states))
    chunk_states = A.new_empty((batch, channels, num_chunks(length), states))
    return u.new_empty(u.shape), last_state, chunk_states


@backward_op.register_fake
def _(grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus):
    return (
        u.new_empty(u.shape),
        delta.new_empty(delta.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty((0,)) if D is None else D.new_empty(D.shape),
        u.new_empty((0,)) if z is None else z.new_empty(z.shape),
        A.new_empty((0,)) if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


def _save(ctx, inputs, output):
    u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus = inputs
    chunk_states = output[2]
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, chunk_states)


def _backward(ctx, grad_out, grad_last_state, _):
    u, delta, A, B, C, D, z, delta_bias, chunk_states = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(u)
    if grad_last_state is not None:
        grad_last_state = grad_last_state.contiguous()
    grads = backward_op(
        grad_out.contiguous(), grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states, ctx.delta_softplus
    )
    *grads, dD, dz, ddelta_bias = grads
    optional = [None if x is None else grad for x, grad in ((D, dD), (z, dz), (delta_bias, ddelta_bias))]
    return *grads, *optional, None


forward_op.register_autograd(_backward, setup_context=_save)
register_vmap(forward_op, backward_op, per_item=(0, 1, 3, 4, 6))  # u, delta, B, C, z

# A half-precision scan output overflows where a following norm would bring it back: under autocast the scan is fp32.
for _device in ("cpu", "cuda"):
    forward_op.register_autocast(_device, torch.float32)
    backward_op.register_autocast(_device, torch.float32)

if native.library is not None:
    forward_op.register_kernel("cpu")(cpu.forward)
    backward_op.register_kernel("cpu")(cpu.backward)
if not gpu.reason:
    from . import triton

    forward_op.register_kernel("cuda")(triton.forward)
    backward_op.register_kernel("cuda")(triton.backward)
