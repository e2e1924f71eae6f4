"""The scan along routes on Triton kernels; `op.py` registers it for CUDA and ROCm tensors where Triton is installed.

Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt, S segments of the routes.
"""

from __future__ import annotations

import torch
import triton

from ..selective_scan.chunks import chunk_length, num_chunks
from ..selective_scan.triton import MAX_STATES, backward_steps, carry, segments_of, warps_of
from ..tiles import DTYPES, on_device
from . import portable
from .triton_backward import backward_kernel, segment_messages_kernel
from .triton_forward import scan_kernel, segment_ends_kernel

# dt_weight of a channel lies in registers.
MAX_RANK = 64
# From so many warps on, each may walk all routes of its channels: no output per route is needed then. (Measured on an
# H200: with 768 warps apart is 1.3 to 1.8 times as fast, with 1,536 as fast; kernels/README.md.)
TOGETHER_WARPS = 1024


def _takes(x, dt_b_c, dt_weight, A, D, delta_bias) -> bool:
    """The kernels take one dtype of at most 32 bits for x and dt_b_c, float32 parameters, and limited sizes."""
    parameters = {t.dtype for t in (A, D, delta_bias) if t is not None}
    sizes = A.shape[2] <= MAX_STATES and dt_weight.shape[2] <= MAX_RANK
    return x.dtype == dt_b_c.dtype and x.dtype in DTYPES and parameters == {torch.float32} and sizes


class _Call:
    """How a call is cut into programs, each for `lanes` channels and all routes or a segment of one, and its sizes."""

    def __init__(self, x, dt_weight, A, order, softplus: bool):
        self.batch, self.positions = x.shape[:2]
        self.routes, self.channels, self.states = A.shape
        self.length, self.rank = order.shape[1], dt_weight.shape[2]
        self.device = A.device
        self.lanes = min(32, triton.next_power_of_2(self.channels))
        self.blocks = triton.cdiv(self.channels, self.lanes)
        warps = warps_of(self.states)
        # One route of a shared x is one of its own.
        self.own = x.ndim == 4 or self.routes == 1
        together = not self.own and self.batch * self.blocks * warps >= TOGETHER_WARPS
        self.walkers = 1 if together else self.routes
        self.chunk = chunk_length(self.length)
        self.segment_steps, self.segments = self.length, 1
        if not together:
            walks = self.batch * self.blocks * self.walkers
            self.segment_steps, self.segments = segments_of(self.length, self.chunk, walks * warps)
        self.programs = self.batch * self.blocks * self.walkers * self.segments
        self.A = A.permute(2, 0, 1).reshape(self.states, -1).contiguous()
        self.weight = dt_weight.permute(2, 0, 1).reshape(self.rank, -1).float().contiguous()
        self.numbers = self.rank + 2 * self.states
        self.padded_states = triton.next_power_of_2(self.states)
        self.steps = 8 if self.states <= 4 else 4
        self.sizes = {
            "channels": self.channels,
            "blocks": self.blocks,
            "positions": self.positions,
            "length": self.length,
            "routes": self.routes,
            "walkers": self.walkers,
            "segment_steps": self.segment_steps,
            "segments": self.segments,
            "STATES": self.states,
            "RANK": self.rank,
            "PADDED_STATES": self.padded_states,
            # With one state a tile holds dt, B and C.
            "PADDED_RANK": triton.next_power_of_2(self.rank + 2 if self.states == 1 else self.rank),
            "LANES": self.lanes,
            "SOFTPLUS": softplus,
            "EVEN": self.channels % self.lanes == 0,
            "WIDE": self.positions * self.routes * max(self.channels, self.numbers) >= 2**31,
            "X_ROUTES": self.own,
            "num_warps": warps,
            "enable_fp_fusion": True,
        }

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_per_segment(self, *shape: int) -> torch.Tensor:
        """(B, S, *shape, K * D)."""
        return self.empty(self.batch, self.segments, *shape, self.routes * self.channels)

    def entering(self, kernel, inputs, reverse: bool) -> torch.Tensor:
        """What enters each segment (B, S, N, K * D) if `kernel` finds what leaves them."""
        ends, dt_sums = self.empty_per_segment(self.states), self.empty_per_segment()
        kernel[(self.programs,)](*inputs, ends, dt_sums, **self.sizes, STEPS=self.steps)
        return carry(self.A, ends, dt_sums, None, reverse)

    def zeros_like_output(self, x) -> torch.Tensor:
        """Where kernels put or add what has x's shape: routes of their own in x's dtype, else float32 to be summed."""
        # Positions that no route visits stay 0.
        if self.own:
            return torch.zeros_like(x)
        routes = () if self.walkers == 1 else (self.routes,)
        shape = (self.batch, self.positions, *routes, self.channels)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def summed(self, out, x) -> torch.Tensor:
        """`zeros_like_output(x)`, filled, as a tensor like x."""
        return out if self.own else (out if self.walkers == 1 else out.sum(2)).to(x.dtype)


def forward(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus):
    """`vssm::cross_selective_scan_forward`: y like x, chunk states (B, K, D, S, N)."""
    if not _takes(x, dt_b_c, dt_weight, A, D, delta_bias):
        return portable.cross_selective_scan_forward(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus)
    chunk_states = A.new_empty((x.shape[0], *A.shape[:2], num_chunks(order.shape[1]), A.shape[2]))
    if x.shape[0] == 0:
        return torch.empty_like(x), chunk_states
    call = _Call(x, dt_weight, A, order, delta_softplus)
    out = call.zeros_like_output(x)
    with on_device(x):
        starts = None
        if call.segments > 1:
            inputs = (x, dt_b_c, call.weight, call.A, order, delta_bias)
            starts = call.entering(segment_ends_kernel, inputs, reverse=False)
        scan_kernel[(call.programs,)](
            *(x, dt_b_c, call.weight, call.A, order, D, delta_bias, starts, out, chunk_states),
            **call.sizes,
            chunk=call.chunk,
            STEPS=call.steps,
            OUT_ROUTES=call.own or call.walkers > 1,
        )
    return call.summed(out, x), chunk_states


def backward(grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus):
    """`vssm::cross_selective_scan_backward`: gradients in the order of the inputs, empty for absent ones."""
    inputs = (x, dt_b_c, dt_weight, A, D, delta_bias)
    if not _takes(*inputs):
        return portable.cross_selective_scan_backward(
            grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus
        )
    if x.shape[0] == 0:
        return tuple(A.new_empty((0,)) if t is None else torch.zeros_like(t) for t in inputs)
    call = _Call(x, dt_weight, A, order, delta_softplus)
    steps = backward_steps(call.padded_states)
    dx = call.zeros_like_output(x)
    rows = (call.batch, call.positions, call.routes, call.numbers)
    number_sums = torch.zeros((call.blocks, *rows), dtype=torch.float32, device=call.device)
    weight_sums, dA_sums = call.empty_per_segment(call.rank), call.empty_per_segment(call.states)
    channel_sums = call.empty(2, call.batch, call.segments, call.routes, call.channels)
    scratch = call.empty(call.programs, call.chunk // steps, call.padded_states, call.lanes)
    with on_device(x):
        messages = None
        if call.segments > 1:
            needed = (grad_y, dt_b_c, call.weight, call.A, order, delta_bias)
            messages = call.entering(segment_messages_kernel, needed, reverse=True)
        backward_kernel[(call.programs,)](
            *(grad_y, messages, x, dt_b_c, call.weight, call.A, order, D, delta_bias, chunk_states, scratch),
            *(dx, number_sums, weight_sums, dA_sums, channel_sums),
            **call.sizes,
            batches=call.batch,
            chunk=call.chunk,
            STEPS=steps,
            OUT_ROUTES=call.own or call.walkers > 1,
        )

    def parameter(sums):
        """(B, S, Z, K * D) to (K, D, Z)."""
        return sums.sum((0, 1)).unflatten(1, (call.routes, call.channels)).permute(1, 2, 0).contiguous()

    dD, dbias = (sums.sum((0, 1)) for sums in channel_sums)
    dweight, dA = parameter(weight_sums).to(dt_weight.dtype), parameter(dA_sums)
    gradients = (call.summed(dx, x), number_sums.sum(0).to(x.dtype), dweight, dA, dD, dbias)
    return tuple(A.new_empty((0,)) if t is None else grad for t, grad in zip(inputs, gradients, strict=True))
