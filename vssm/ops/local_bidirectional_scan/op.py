"""`vssm::local_bidirectional_scan_forward`, `_backward` for the PyTorch dispatcher: schema, fake, autograd, autocast.

The default body is the portable implementation, on every device; kernels register themselves for theirs.
Letters: B batch, D channels, L steps, N states, G groups of B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from ..vmap import register_vmap
from . import cpu, portable
from .chunks import windowed_num_chunks


@torch.library.custom_op("vssm::local_bidirectional_scan_forward", mutates_args=())
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
    window: int,
) -> tuple[Tensor, Tensor]:
    return portable.local_bidirectional_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window)


@torch.library.custom_op("vssm::local_bidirectional_scan_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
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
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return portable.local_bidirectional_scan_backward(
        grad_out, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus, window
    )


@forward_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window):
    batch, channels, length = u.shape
    chunk_states = A.new_empty((batch, channels, windowed_num_chunks(length, window), A.shape[1]))
    return u.new_empty(u.shape), chunk_states


@backward_op.register_fake
def _(grad_out, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus, window):
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
    *tensors, ctx.delta_softplus, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_out, _):
    tensors = ctx.saved_tensors
    *grads, dD, dz, ddelta_bias = backward_op(grad_out.contiguous(), *tensors, ctx.delta_softplus, ctx.window)
    D, z, delta_bias = tensors[5:8]
    optional = [None if x is None else grad for x, grad in ((D, dD), (z, dz), (delta_bias, ddelta_bias))]
    return *grads, *optional, None, None


forward_op.register_autograd(_backward, setup_context=_save)
register_vmap(forward_op, backward_op, per_item=(0, 1, 3, 4, 6))  # u, delta, B, C, z

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
