"""The selective scan on Triton kernels; `op.py` registers it for CUDA and ROCm tensors where Triton is installed.

The locally bi-directional scan runs the same kernels with a WINDOW of more than one step.

Letters: B batch, D channels, L steps, N states, G groups of B and C, S segments of the sequence.
"""

from __future__ import annotations

import torch
import triton

from ..tiles import DTYPES, on_device, unit_of
from . import portable
from .chunks import chunk_length
from .triton_backward import backward_kernel, segment_messages_kernel
from .triton_forward import carry_kernel, scan_kernel, segment_ends_kernel

MAX_STATES = 256
# The least number of warps that makes good use of the 528 schedulers of an H200. With fewer, the sequences are cut into
# segments, which costs one more pass over them, to give about CUT_WARPS. (Measured: kernels/README.md.)
FULL_WARPS = 512
CUT_WARPS = 4096
# Steps of a piece of a sequence with one state, forward and backward: a thread has the registers for more than the
# sixteen bytes of other pieces, and every line of memory is then touched fewer times.
ONE_STATE_STEPS, ONE_STATE_BACKWARD_STEPS = 16, 8
# States of a channel that fill the registers of a thread; with more of them several warps share a channel.
WARP_STATES = 16


def warps_of(states: int) -> int:
    """Warps that share a channel of so many states."""
    return triton.cdiv(triton.next_power_of_2(states), WARP_STATES)


def backward_steps(states: int, window: int = 1) -> int:
    """Steps of a piece of the backward walk, of which a thread holds all states and shared memory their products."""
    # A window doubles what a thread holds of a step.
    held = states if window == 1 else 2 * states
    return 4 if held <= 16 else 2 if held <= 64 else 1


def segments_of(length: int, chunk: int, warps: int) -> tuple[int, int]:
    """Steps of a segment, whole chunks, and segments of a sequence: one where `warps` without cutting are enough."""
    chunks, segments = triton.cdiv(length, chunk), 1
    if warps < FULL_WARPS and chunks > 2:
        segments = min(chunks, triton.cdiv(CUT_WARPS, max(1, warps)))
    segment_chunks = triton.cdiv(chunks, segments)
    return segment_chunks * chunk, triton.cdiv(chunks, segment_chunks)


def carry(A, ends, dt_sums, first, reverse: bool) -> torch.Tensor:
    """What enters each segment, like `ends` (B, S, N, D), the first from `first` (B, N, D) or zero.

    A is (N, D) and `dt_sums` (B, S, D), both with fewer columns if so many neighbouring channels share one.
    """
    batch, segments, states, channels = ends.shape
    result = torch.empty_like(ends)
    # Tiles of up to 1,024 numbers, at least a sector of memory wide where there are so many channels.
    tile = min(128, triton.next_power_of_2(segments))
    width = min(1024 // tile, triton.next_power_of_2(channels))
    carry_kernel[(batch * states * triton.cdiv(channels, width),)](
        *(A, ends, dt_sums, first, result, channels, channels // A.shape[1], states, segments),
        **{"REVERSE": reverse, "CHANNELS": width, "TILE": tile, "num_warps": 4, "enable_fp_fusion": True},
    )
    return result


def takes(u, delta, A, B, C, D, z, delta_bias) -> bool:
    """The kernels take one dtype of at most 32 bits for the sequences, float32 parameters and at most 256 states."""
    sequences = {x.dtype for x in (u, delta, B, C, z) if x is not None}
    parameters = {x.dtype for x in (A, D, delta_bias) if x is not None}
    return len(sequences) == 1 and u.dtype in DTYPES and parameters == {torch.float32} and A.shape[1] <= MAX_STATES


class _Call:
    """How a call is cut into programs, each for `lanes` channels of one group and one segment, and what they share."""

    def __init__(self, u, A, B, softplus: bool, chunk: int, window: int):
        self.batch, self.channels, self.length = u.shape
        self.groups, self.states = B.shape[1], A.shape[1]
        group_channels = self.channels // self.groups
        self.lanes = min(32, triton.next_power_of_2(group_channels))
        self.blocks = triton.cdiv(group_channels, self.lanes)
        sequences, warps = self.batch * self.groups * self.blocks, warps_of(self.states)
        self.segment_steps, self.segments = segments_of(self.length, chunk, sequences * warps)
        self.programs = sequences * self.segments
        self.A = A.t().contiguous()
        self.padded_states = triton.next_power_of_2(self.states)
        # Sixteen bytes of a channel a load, which one thread can hold as they are.
        self.steps = 16 // u.element_size()
        if window == 1 and self.states == 1:
            self.steps = ONE_STATE_STEPS
        elif window > 1 and self.padded_states > 8:
            # A thread has no registers to walk eight steps of so many states both ways.
            self.steps = 4
        unit = unit_of(self.length)
        self.sizes = {
            "channels": self.channels,
            "group_channels": group_channels,
            "blocks": self.blocks,
            "units": self.length // unit,
            "states": self.states,
            "segment_steps": self.segment_steps,
            "segments": self.segments,
            "UNIT": unit,
            "STATES": self.padded_states,
            "LANES": self.lanes,
            "SOFTPLUS": softplus,
            "num_warps": warps,
            "enable_fp_fusion": True,
        }

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.A.device)

    def empty_per_segment(self) -> torch.Tensor:
        return self.empty(self.batch, self.segments, self.states, self.channels)

    def entering(self, kernel, inputs, first, reverse: bool) -> torch.Tensor:
        """What enters each segment (B, S, N, D) if `kernel` finds what leaves them and `first` enters the sequence."""
        ends, dt_sums = self.empty_per_segment(), self.empty(self.batch, self.segments, self.channels)
        kernel[(self.programs,)](*inputs, ends, dt_sums, **self.sizes, STEPS=self.steps)
        return carry(self.A, ends, dt_sums, first, reverse)


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """`vssm::selective_scan_forward`: out (B, D, L), last state (B, D, N), chunk states (B, D, chunks, N)."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not takes(*inputs):
        return portable.selective_scan_forward(*inputs, delta_softplus)
    return scan(*inputs, delta_softplus, chunk_length(u.shape[2]))


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, chunk: int, window: int = 1):
    """`forward` for what the kernels take, in chunks of whole windows; of one step, a window changes nothing."""
    batch, channels, length = u.shape
    out, last_state = torch.empty_like(u), A.new_empty((batch, channels, A.shape[1]))
    chunk_states = A.new_empty((batch, channels, triton.cdiv(length, chunk), A.shape[1]))
    if batch > 0:
        call = _Call(u, A, B, delta_softplus, chunk, window)
        seen_ahead = call.empty(call.programs, call.lanes, window) if window > call.steps else None
        with on_device(u):
            starts = None
            if call.segments > 1:
                starts = call.entering(segment_ends_kernel, (u, delta, call.A, B, delta_bias), None, reverse=False)
            scan_kernel[(call.programs,)](
                *(u, delta, call.A, B, C, D, z, delta_bias, starts, seen_ahead, out, last_state, chunk_states),
                **call.sizes,
                chunk=chunk,
                STEPS=call.steps,
                WINDOW=window,
            )
    return out, last_state, chunk_states


def backward(grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus):
    """`vssm::selective_scan_backward`: gradients in the order of the inputs, empty for absent ones."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not takes(*inputs):
        return portable.selective_scan_backward(grad_out, grad_last_state, *inputs, chunk_states, delta_softplus)
    return scan_gradients(grad_out, grad_last_state, inputs, chunk_states, delta_softplus, chunk_length(u.shape[2]))


def scan_gradients(
    grad_out, grad_last_state, inputs, chunk_states, delta_softplus, chunk: int, window: int = 1
) -> tuple[torch.Tensor, ...]:
    """`backward` for what the kernels take; `chunk` and `window` as for `scan`."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    if u.shape[0] == 0:
        return _or_empty([None if x is None else torch.zeros_like(x) for x in inputs], inputs)
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), None if z is None else torch.empty_like(z)
    call = _Call(u, A, B, delta_softplus, chunk, window)
    states = call.padded_states
    steps = ONE_STATE_BACKWARD_STEPS if window == 1 and states == 1 else backward_steps(states, window)
    # (B, S, N, D) with one segment.
    messages = None if grad_last_state is None else grad_last_state.transpose(1, 2).contiguous()
    dA_sums, channel_sums = call.empty_per_segment(), call.empty(2, call.batch, call.segments, call.channels)
    padded_length = triton.cdiv(call.length, steps) * steps
    group_sums = call.empty(call.batch, call.groups, call.blocks, padded_length, 2, states)
    # States, and what passes them on within windows longer than a piece.
    scratch = call.empty(call.programs, 2 if window > steps else 1, chunk // steps, states, call.lanes)
    with on_device(u):
        if call.segments > 1:
            needed = (grad_out, delta, call.A, C, z, delta_bias)
            messages = call.entering(segment_messages_kernel, needed, messages, reverse=True)
        backward_kernel[(call.programs,)](
            *(grad_out, messages, u, delta, call.A, B, C, D, z, delta_bias, chunk_states, scratch),
            *(du, ddelta, dz, channel_sums, dA_sums, group_sums),
            **call.sizes,
            chunk=chunk,
            STEPS=steps,
            WINDOW=window,
        )
    dA = dA_sums.sum((0, 1)).t().contiguous()
    dD, dbias = (sums.sum((0, 1)) for sums in channel_sums)
    group_gradients = group_sums.sum(2)[:, :, : call.length, :, : call.states].unbind(3)
    dB, dC = (torch.empty_like(x).copy_(grad.mT) for x, grad in zip((B, C), group_gradients, strict=True))
    return _or_empty((du, ddelta, dA, dB, dC, dD, dz, dbias), inputs)


def _or_empty(gradients, inputs) -> tuple[torch.Tensor, ...]:
    """The gradients of the inputs that are there, and empty tensors for the others, a gate's in the dtype of u."""
    empty = {place: inputs[0 if place == 6 else 2].new_empty((0,)) for place, x in enumerate(inputs) if x is None}
    return tuple(empty.get(place, gradient) for place, gradient in enumerate(gradients))
