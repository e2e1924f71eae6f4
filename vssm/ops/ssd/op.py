"""`vssm::ssd_forward` and `_backward` for the PyTorch dispatcher: schema, fake, autograd, autocast.

The default body is the portable implementation, on every device; kernels register themselves for theirs.
Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from ..vmap import register_vmap
from . import cpu, portable


@torch.library.custom_op("vssm::ssd_forward", mutates_args=())
def forward_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    return portable.ssd_forward(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, chunk_size)


@torch.library.custom_op("vssm::ssd_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    grad_final_states: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return portable.ssd_backward(
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
    )


@forward_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, chunk_size):
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), A.new_empty((batch, heads, width, B.shape[3]))


@backward_op.register_fake
def _(
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
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    return tuple(x.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in inputs)


def _save(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.dt_min, ctx.dt_max, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out, grad_final_states):
    inputs = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(inputs[0])
    if grad_final_states is not None:
        grad_final_states = grad_final_states.contiguous()
    settings = ctx.dt_softplus, ctx.dt_min, ctx.dt_max, ctx.chunk_size
    grads = backward_op(grad_out.contiguous(), grad_final_states, *inputs, *settings)
    return *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)), None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)
register_vmap(forward_op, backward_op, per_item=(0, 1, 3, 4, 6, 8))  # x, dt, B, C, z, initial_states

# As for the selective scan: under autocast everything is float32.
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
