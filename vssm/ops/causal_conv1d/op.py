"""`vssm::causal_conv1d_forward` and `_backward` for the PyTorch dispatcher: schema, fake, autograd.

The default body is the portable implementation, on every device; kernels register themselves for theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from ..vmap import register_vmap
from . import cpu, portable


@torch.library.custom_op("vssm::causal_conv1d_forward", mutates_args=())
def forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return portable.causal_conv1d_forward(x, weight, bias, silu)


@torch.library.custom_op("vssm::causal_conv1d_backward", mutates_args=())
def backward_op(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return portable.causal_conv1d_backward(grad_out, x, weight, bias, silu)


@forward_op.register_fake
def _(x, weight, bias, silu):
    return x.new_empty(x.shape)


@backward_op.register_fake
def _(grad_out, x, weight, bias, silu):
    bias_grad = weight.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias_grad


def _save(ctx, inputs, output):
    x, weight, bias, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad_out):
    x, weight, bias = ctx.saved_tensors
    x_grad, weight_grad, bias_grad = backward_op(grad_out.contiguous(), x, weight, bias, ctx.silu)
    return x_grad, weight_grad, None if bias is None else bias_grad, None


forward_op.register_autograd(_backward, setup_context=_save)
register_vmap(forward_op, backward_op, per_item=(0,))  # x

if native.library is not None:
    forward_op.register_kernel("cpu")(cpu.forward)
    backward_op.register_kernel("cpu")(cpu.backward)
if not gpu.reason:
    from . import triton

    forward_op.register_kernel("cuda")(triton.forward)
    backward_op.register_kernel("cuda")(triton.backward)
