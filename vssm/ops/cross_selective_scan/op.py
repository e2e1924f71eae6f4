"""`vssm::cross_selective_scan_forward` and `_backward` for the PyTorch dispatcher: schema, fake, autograd, autocast.

The default body is the portable implementation, on every device; kernels register themselves for theirs.
Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt, S chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from ..selective_scan.chunks import num_chunks
from ..vmap import register_vmap
from . import cpu, portable


@torch.library.custom_op("vssm::cross_selective_scan_forward", mutates_args=())
def forward_op(
    x: Tensor,
    dt_b_c: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    order: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    return portable.cross_selective_scan_forward(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus)


@torch.library.custom_op("vssm::cross_selective_scan_backward", mutates_args=())
def backward_op(
    grad_y: Tensor,
    x: Tensor,
    dt_b_c: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    order: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return portable.cross_selective_scan_backward(
        grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus
    )


@forward_op.register_fake
def _(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus):
    routes, channels, states = A.shape
    return x.new_empty(x.shape), A.new_empty((x.shape[0], routes, channels, num_chunks(order.shape[1]), states))


@backward_op.register_fake
def _(grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus):
    return (
        x.new_empty(x.shape),
        dt_b_c.new_empty(dt_b_c.shape),
        dt_weight.new_empty(dt_weight.shape),
        A.new_empty(A.shape),
        A.new_empty((0,)) if D is None else D.new_empty(D.shape),
        A.new_empty((0,)) if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.delta_softplus = inputs
    chunk_states = output[1]
    ctx.mark_non_differentiable(chunk_states)
    ctx.save_for_backward(*tensors, chunk_states)


def _backward(ctx, grad_y, _):
    x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states = ctx.saved_tensors
    grads = backward_op(
        grad_y.contiguous(), x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, ctx.delta_softplus
    )
    *grads, dD, ddelta_bias = grads
    return *grads, None, None if D is None else dD, None if delta_bias is None else ddelta_bias, None


forward_op.register_autograd(_backward, setup_context=_save)

# A half-precision sum over routes overflows where a following norm would bring it back: under autocast all is fp32.
for _device in ("cpu", "cuda"):
    forward_op.register_autocast(_device, torch.float32)
    backward_op.register_autocast(_device, torch.float32)

# x and dt_b_c begin with the batch.
register_vmap(forward_op, backward_op, per_item=(0, 1))

if native.library is not None:
    forward_op.register_kernel("cpu")(cpu.forward)
    backward_op.register_kernel("cpu")(cpu.backward)
if not gpu.reason:
    from . import triton

    forward_op.register_kernel("cuda")(triton.forward)
    backward_op.register_kernel("cuda")(triton.backward)
