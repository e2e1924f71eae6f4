"""`vssm::nc_ssd_forward` and `_backward` for the PyTorch dispatcher: schema, fake, autograd, autocast.

The body is the portable implementation, on every device: PyTorch's matrix products are the kernel.
Letters: B batch, L positions, H heads, P channels of a head, G groups of B and C, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..vmap import register_vmap
from . import portable


@torch.library.custom_op("vssm::nc_ssd_forward", mutates_args=())
def forward_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return portable.nc_ssd_forward(x, dt, A, B, C, D, dt_bias, dt_softplus)


@torch.library.custom_op("vssm::nc_ssd_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return portable.nc_ssd_backward(grad_out, x, dt, A, B, C, D, dt_bias, dt_softplus)


@forward_op.register_fake
def _(x, dt, A, B, C, D, dt_bias, dt_softplus):
    return x.new_empty(x.shape)


@backward_op.register_fake
def _(grad_out, x, dt, A, B, C, D, dt_bias, dt_softplus):
    return tuple(A.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, dt_bias))


def _save(ctx, inputs, output):
    *tensors, ctx.dt_softplus = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out):
    inputs = ctx.saved_tensors
    grads = backward_op(grad_out.contiguous(), *inputs, ctx.dt_softplus)
    return *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)), None


forward_op.register_autograd(_backward, setup_context=_save)
register_vmap(forward_op, backward_op, per_item=(0, 1, 3, 4))  # x, dt, B, C

# As for the selective scan: under autocast everything is float32.
for _device in ("cpu", "cuda"):
    forward_op.register_autocast(_device, torch.float32)
    backward_op.register_autocast(_device, torch.float32)
