"""The causal depthwise convolution on Triton kernels; `op.py` registers it for CUDA and ROCm tensors if Triton imports.

A lane works on one vector of 16 bytes of a row. It loads the vectors before it (and in the backward pass after it) as
well, aligned like its own and in the L1 cache thanks to its neighbours, so that every shifted input is a register and
memory is read about once.

Letters: B batch, D channels, L steps, K taps, V steps of a vector.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..tiles import DTYPES, columns, on_device, tile_of, unit_of
from . import portable

MAX_TAPS = 8
# Vectors of a program: one for each thread of four warps.
VECTORS = 128
# So many times over in the backward pass, to leave few partial sums.
BACKWARD_TILES = 8


@triton.jit
def place(rows, length, tiles, segments, ROW_VECTORS: tl.constexpr, VECTORS: tl.constexpr, V: tl.constexpr):
    """The row (B * D of them) and first step of each lane, whether it has a row, and the steps to the next tile."""
    lane = tl.arange(0, VECTORS)
    row = (tl.program_id(0) // segments).to(tl.int64) * (VECTORS // ROW_VECTORS) + lane // ROW_VECTORS
    first = (tl.program_id(0) % segments * tiles * ROW_VECTORS + lane % ROW_VECTORS) * V
    return row, first, row < rows


@triton.jit
def window(
    pointer, row, first, real, length, BACK: tl.constexpr, AHEAD: tl.constexpr, VECTORS: tl.constexpr, V: tl.constexpr
):
    """The steps from BACK vectors before each lane's to AHEAD after it, as (BACK + 1 + AHEAD) * V vectors of lanes."""
    steps = ()
    for i in tl.static_range(-BACK, AHEAD + 1):
        t = (first + i * V)[:, None] + tl.arange(0, V)[None, :]
        mask = real[:, None] & (t >= 0) & (t < length)
        vector = tl.load(pointer + row[:, None] * length + t, mask=mask, other=0.0)
        steps = steps + columns(vector.to(tl.float32), VECTORS, V)
    return steps


@triton.jit
def load_weights(weight, bias, row, real, channels, TAPS: tl.constexpr, VECTORS: tl.constexpr):
    """The taps of each lane's channel, and after them its bias or 0."""
    weights = ()
    for k in tl.static_range(TAPS):
        weights = weights + (tl.load(weight + row % channels * TAPS + k, mask=real, other=0.0),)
    if bias is not None:
        weights = weights + (tl.load(bias + row % channels, mask=real, other=0.0),)
    else:
        weights = weights + (tl.zeros([VECTORS], tl.float32),)
    return weights


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    channels,
    units,
    segments,
    UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    BACK: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    VECTORS: tl.constexpr,
    V: tl.constexpr,
    SILU: tl.constexpr,
):
    length = units * UNIT
    row, first, real = place(rows, length, 1, segments, ROW_VECTORS, VECTORS, V)
    weights = load_weights(weight, bias, row, real, channels, TAPS, VECTORS)
    inputs = window(x, row, first, real, length, BACK, 0, VECTORS, V)
    result = ()
    for i in tl.static_range(V):
        total = weights[TAPS]
        for k in tl.static_range(TAPS):
            total += weights[k] * inputs[BACK * V + i - (TAPS - 1) + k]
        if SILU:
            total *= tl.sigmoid(total)
        result = result + (total,)
    t = first[:, None] + tl.arange(0, V)[None, :]
    tl.store(out + row[:, None] * length + t, tile_of(result, VECTORS, V), mask=real[:, None] & (t < length))


@triton.jit
def backward_kernel(
    grad_out,
    x,
    weight,
    bias,
    dx,
    sums,
    rows,
    channels,
    units,
    tiles,
    segments,
    UNIT: tl.constexpr,
    TAPS: tl.constexpr,
    BACK: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    VECTORS: tl.constexpr,
    V: tl.constexpr,
    SILU: tl.constexpr,
    SUMS: tl.constexpr,
):
    """dx, and `sums` (B * D, segments, SUMS): for each row the gradients of its K taps and after them of its bias."""
    length = units * UNIT
    row, first, real = place(rows, length, tiles, segments, ROW_VECTORS, VECTORS, V)
    weights = load_weights(weight, bias, row, real, channels, TAPS, VECTORS)
    sum_tile = tl.zeros([VECTORS, SUMS], tl.float32)
    for tile in range(0, tiles):
        start = first + tile * ROW_VECTORS * V
        inputs = window(x, row, start, real, length, BACK, BACK if SILU else 0, VECTORS, V)
        # Gradients before the activation, as far ahead as a tap reaches back.
        grads = window(grad_out, row, start, real, length, 0, BACK, VECTORS, V)
        before = ()
        for i in tl.static_range(V + TAPS - 1):
            grad = grads[i]
            if SILU:
                total = weights[TAPS]
                for k in tl.static_range(TAPS):
                    total += weights[k] * inputs[BACK * V + i - (TAPS - 1) + k]
                sigmoid = tl.sigmoid(total)
                grad *= sigmoid * (1 + total * (1 - sigmoid))
            before = before + (grad,)
        result = ()
        for i in tl.static_range(V):
            total = weights[0] * before[i + TAPS - 1]
            for k in tl.static_range(1, TAPS):
                total += weights[k] * before[i + TAPS - 1 - k]
            result = result + (total,)
        t = start[:, None] + tl.arange(0, V)[None, :]
        tl.store(dx + row[:, None] * length + t, tile_of(result, VECTORS, V), mask=real[:, None] & (t < length))

        lane_sums = ()
        for k in tl.static_range(SUMS):
            total = tl.zeros([VECTORS], tl.float32)
            if k <= TAPS:
                for i in tl.static_range(V):
                    total += before[i] * inputs[BACK * V + i - (TAPS - 1) + k] if k < TAPS else before[i]
            lane_sums = lane_sums + (total,)
        sum_tile += tile_of(lane_sums, VECTORS, SUMS)
    per_row = tl.sum(tl.reshape(sum_tile, [VECTORS // ROW_VECTORS, ROW_VECTORS, SUMS]), axis=1)
    row = (tl.program_id(0) // segments).to(tl.int64) * (VECTORS // ROW_VECTORS)
    row += tl.arange(0, VECTORS // ROW_VECTORS)
    place_of_sum = (row * segments + tl.program_id(0) % segments)[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
    tl.store(sums + place_of_sum, per_row, mask=(row < rows)[:, None])


class _Launch:
    """How a call is cut into programs that work on up to `tiles` tiles of VECTORS vectors, and the sizes they take."""

    def __init__(self, x, taps: int, silu: bool, tiles: int):
        batch, channels, length = x.shape
        vector, unit = 16 // x.element_size(), unit_of(length)
        vectors = triton.cdiv(length, vector)
        row_vectors = min(VECTORS, triton.next_power_of_2(vectors))
        self.tiles = min(tiles, triton.cdiv(vectors, row_vectors))
        self.segments = triton.cdiv(vectors, row_vectors * self.tiles)
        self.programs = triton.cdiv(batch * channels, VECTORS // row_vectors) * self.segments
        self.sizes = {
            "rows": batch * channels,
            "channels": channels,
            "units": length // unit,
            "segments": self.segments,
            "UNIT": unit,
            "TAPS": taps,
            "BACK": triton.cdiv(taps - 1, vector),
            "ROW_VECTORS": row_vectors,
            "VECTORS": VECTORS,
            "V": vector,
            "SILU": silu,
            "num_warps": VECTORS // 32,
            "enable_fp_fusion": True,
        }


def forward(x, weight, bias, silu):
    """`vssm::causal_conv1d_forward`: (B, D, L) in x's dtype."""
    # The kernels have no float64, and no registers for many taps.
    if x.dtype not in DTYPES or weight.shape[1] > MAX_TAPS:
        return portable.causal_conv1d_forward(x, weight, bias, silu)
    out = torch.empty_like(x)
    if x.shape[0] > 0:
        launch = _Launch(x, weight.shape[1], silu, tiles=1)
        with on_device(x):
            forward_kernel[(launch.programs,)](
                *(x, weight.float(), None if bias is None else bias.float(), out), **launch.sizes
            )
    return out


def backward(grad_out, x, weight, bias, silu):
    """`vssm::causal_conv1d_backward`: gradients of x, weight and bias, the last empty without a bias."""
    if x.dtype not in DTYPES or weight.shape[1] > MAX_TAPS:
        return portable.causal_conv1d_backward(grad_out, x, weight, bias, silu)
    (batch, channels, _), taps = x.shape, weight.shape[1]
    dx = torch.empty_like(x)
    if batch == 0:
        sums = weight.new_zeros((channels, taps + 1))
    else:
        launch = _Launch(x, taps, silu, BACKWARD_TILES)
        sums_of_row = triton.next_power_of_2(taps + 1)
        shape = (batch, channels, launch.segments, sums_of_row)
        sums = torch.empty(shape, dtype=torch.float32, device=weight.device)
        with on_device(x):
            backward_kernel[(launch.programs,)](
                *(grad_out, x, weight.float(), None if bias is None else bias.float(), dx, sums),
                **launch.sizes,
                tiles=launch.tiles,
                SUMS=sums_of_row,
            )
        sums = sums.sum((0, 2))
    dweight = torch.empty_like(weight).copy_(sums[:, :taps])
    dbias = weight.new_empty((0,)) if bias is None else torch.empty_like(bias).copy_(sums[:, taps])
    return dx, dweight, dbias
