"""Mamba-2's scan on Triton kernels; `op.py` registers it for CUDA and ROCm tensors where Triton is installed.

Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states, S chunks, T steps of one.
"""

from __future__ import annotations

import torch
import triton

from ..selective_scan.triton import carry
from ..tiles import DTYPES, on_device
from . import portable
from .triton_backward import group_gradients_kernel, input_gradients_kernel
from .triton_forward import chunk_ends_kernel, output_kernel

# Steps of a chunk, states and channels of a tile: at most this, and at least 16, which matrix units want. The kernels
# of the backward pass hold more tiles at a time, for which there are registers if the tiles are smaller.
MAX_STEPS, MAX_STATES, FORWARD_WIDTH, BACKWARD_WIDTH = 64, 32, 64, 32
# With fewer programs than this, the heads of a group are divided between several to sum the gradients of B and C.
FULL_PROGRAMS = 512


def _takes(x, dt, A, B, C, D, z, dt_bias, initial_states) -> bool:
    """The kernels take one dtype of at most 32 bits for the sequences, dt in it or float32, and float32 parameters."""
    sequences = {t.dtype for t in (x, B, C, z) if t is not None}
    parameters = {t.dtype for t in (A, D, dt_bias, initial_states) if t is not None}
    return len(sequences) == 1 and x.dtype in DTYPES and dt.dtype in DTYPES and parameters == {torch.float32}


def _tile(size: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(size)))


def precisions(dtype: torch.dtype) -> tuple[str, str]:
    """How matrix units multiply float32 tiles, and tiles that hold nothing but numbers read in `dtype`.

    On NVIDIA a float32 is a sum of three TF32 numbers; one TF32 holds a half-precision number. AMD has float32 units.
    """
    if torch.version.hip:
        return "ieee", "ieee"
    return "tf32x3", "tf32x3" if dtype == torch.float32 else "tf32"


class _Call:
    """How a call is cut into programs and tiles, and the sizes that all kernels take."""

    def __init__(self, x, dt, A, B, dt_bias, dt_softplus, dt_min, dt_max, max_width: int):
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.states = B.shape[2:]
        self.dt, self.A, self.dt_bias = dt, A, dt_bias
        steps, width_tile = _tile(self.length, MAX_STEPS), _tile(self.width, max_width)
        state_tile = _tile(self.states, MAX_STATES)
        self.chunks = triton.cdiv(self.length, steps)
        self.width_blocks = triton.cdiv(self.width, width_tile)
        self.state_blocks = triton.cdiv(self.states, state_tile)
        self.programs = self.batch * self.chunks * self.heads * self.width_blocks
        precision, self.exact = precisions(x.dtype)
        self.sizes = {
            "length": self.length,
            "heads": self.heads,
            "width": self.width,
            "groups": self.groups,
            "states": self.states,
            "chunks": self.chunks,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "STEPS": steps,
            "WIDTH": width_tile,
            "STATES": state_tile,
            "SOFTPLUS": dt_softplus,
            "PRECISION": precision,
            "num_warps": 8 if steps == MAX_STEPS else 4,
            "num_stages": 2,
            "enable_fp_fusion": True,
        }

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.A.device)

    def at_boundaries(self, values, z, weights, first, reverse: bool) -> torch.Tensor:
        """The states (B, S + 1, H, P, N) at the boundaries of chunks, or from C and gradients their adjoints."""
        state = (self.heads, self.width, self.states)
        ends, dt_sums = (
            self.empty(self.batch, self.chunks + 1, *state),
            self.empty(self.batch, self.chunks + 1, state[0]),
        )
        chunk_ends_kernel[(self.programs * self.state_blocks,)](
            *(values, z, self.dt, self.A, weights, self.dt_bias, ends, dt_sums), **self.sizes, REVERSE=reverse
        )
        ends = ends.view(self.batch, self.chunks + 1, 1, -1)
        return carry(self.A[None], ends, dt_sums, first, reverse).view(self.batch, self.chunks + 1, *state)


def forward(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, chunk_size):
    """`vssm::ssd_forward`: out (B, L, H, P), final states (B, H, P, N). The kernels have no use for chunk_size."""
    inputs, settings = (x, dt, A, B, C, D, z, dt_bias, initial_states), (dt_softplus, dt_min, dt_max)
    if not _takes(*inputs):
        return portable.ssd_forward(*inputs, *settings, chunk_size)
    out = torch.empty_like(x)
    if x.shape[0] == 0:
        return out, A.new_empty((*x.shape[:1], *x.shape[2:], B.shape[3]))
    call = _Call(x, dt, A, B, dt_bias, *settings, FORWARD_WIDTH)
    with on_device(x):
        states = call.at_boundaries(x, None, B, initial_states, reverse=False)
        output_kernel[(call.programs,)](
            *(x, dt, A, B, C, portable.skip_weights(D, x), z, dt_bias, states, out), **call.sizes, EXACT=call.exact
        )
    return out, states[:, -1].clone()


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
    if not _takes(*inputs):
        return portable.ssd_backward(grad_out, grad_final_states, *inputs, *settings, chunk_size)
    if x.shape[0] == 0:
        return tuple(x.new_empty((0,)) if t is None else torch.zeros_like(t) for t in inputs)
    call = _Call(x, dt, A, B, dt_bias, *settings, BACKWARD_WIDTH)
    dx, dz = torch.empty_like(x), None if z is None else torch.empty_like(z)
    ddt_sums = call.empty(call.width_blocks, *dt.shape)
    step_sums = call.empty(2, call.width_blocks, call.batch, call.chunks, call.heads)
    skip_sums = call.empty(call.batch, call.chunks, call.heads, call.width)
    group_programs = call.batch * call.chunks * call.groups * call.state_blocks
    group_heads = call.heads // call.groups
    block_heads = triton.cdiv(group_heads, min(group_heads, triton.cdiv(FULL_PROGRAMS, group_programs)))
    head_blocks = triton.cdiv(group_heads, block_heads)
    group_sums = call.empty(2, head_blocks, *B.shape)
    with on_device(x):
        states = call.at_boundaries(x, None, B, initial_states, reverse=False)
        adjoints = call.at_boundaries(grad_out, z, C, grad_final_states, reverse=True)
        input_gradients_kernel[(call.programs,)](
            *(grad_out, x, dt, A, B, C, portable.skip_weights(D, x), z, dt_bias, states, adjoints),
            *(dx, ddt_sums, dz, step_sums, skip_sums),
            **call.sizes,
            EXACT=call.exact,
        )
        group_gradients_kernel[(group_programs * head_blocks,)](
            *(grad_out, x, dt, A, B, C, z, dt_bias, states, adjoints, group_sums),
            **call.sizes,
            head_blocks=head_blocks,
            block_heads=block_heads,
        )
    dA, dbias = (sums.sum((0, 1, 2)) for sums in step_sums)
    dB, dC = (sums.sum(0).to(B.dtype) for sums in group_sums)
    dD = None if D is None else skip_sums.sum((0, 1, 3) if D.ndim == 1 else (0, 1))
    gradients = (dx, ddt_sums.sum(0).to(dt.dtype), dA, dB, dC, dD, dz, dbias, adjoints[:, 0].clone())
    return tuple(x.new_empty((0,)) if t is None else grad for t, grad in zip(inputs, gradients, strict=True))
