"""Pieces shared by the Triton kernels and their launchers: register tiles cut into columns, sums over lanes, softplus.

Imported by the kernels only: this file needs triton.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

# What the kernels take for sequences; they accumulate in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, whose current stream Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def unit_of(length: int) -> int:
    """The largest power of two up to 16 that divides `length`.

    A kernel that gets a row length as a multiple of a constant knows how rows are aligned, and loads 16 bytes at once.
    """
    return next(unit for unit in (16, 8, 4, 2, 1) if length % unit == 0)


@triton.jit
def columns(tile, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The columns of a tile (ROWS, STEPS) as a tuple of vectors (ROWS,); STEPS is a power of two.

    Registers cannot be indexed at run time, so a kernel that walks the steps of a tile unrolls them. Where a row lies
    within one thread, which it does if it has 16 bytes, the cut is free; else it is one exchange through shared memory.
    """
    if STEPS == 1:
        cut = (tl.reshape(tile, [ROWS]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [ROWS, STEPS // 2, 2]))
        evens = columns(even, ROWS, STEPS // 2)
        odds = columns(odd, ROWS, STEPS // 2)
        cut = ()
        for i in tl.static_range(STEPS // 2):
            cut = cut + (evens[i], odds[i])
    return cut


@triton.jit
def tile_of(cut, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The inverse of `columns`."""
    if STEPS == 1:
        tile = tl.reshape(cut[0], [ROWS, 1])
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(STEPS // 2):
            evens = evens + (cut[2 * i],)
            odds = odds + (cut[2 * i + 1],)
        even = tile_of(evens, ROWS, STEPS // 2)
        odd = tile_of(odds, ROWS, STEPS // 2)
        tile = tl.reshape(tl.join(even, odd), [ROWS, STEPS])
    return tile


@triton.jit
def stack(parts, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles (ROWS, LANES), a power of two, one below the other: (COUNT * ROWS, LANES)."""
    if COUNT == 1:
        tile = parts[0]
    else:
        upper = ()
        lower = ()
        for i in tl.static_range(COUNT // 2):
            upper = upper + (parts[i],)
            lower = lower + (parts[COUNT // 2 + i],)
        upper_tile = stack(upper, ROWS, LANES, COUNT // 2)
        lower_tile = stack(lower, ROWS, LANES, COUNT // 2)
        tile = tl.reshape(tl.permute(tl.join(upper_tile, lower_tile), (2, 0, 1)), [COUNT * ROWS, LANES])
    return tile


@triton.jit
def sum_over_lanes(values, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The sums of the rows of (ROWS, LANES), where the lanes of a warp hold the LANES.

    Neighbouring lanes are added pairwise. Each halving lets the compiler hand half of the rows to every other lane,
    so that ROWS sums cost about 2 * ROWS exchanges and additions instead of 5 * ROWS by `tl.sum`.
    """
    if LANES == 1:
        sums = tl.reshape(values, [ROWS])
    else:
        even, odd = tl.split(tl.reshape(values, [ROWS, LANES // 2, 2]))
        sums = sum_over_lanes(even + odd, ROWS, LANES // 2)
    return sums


@triton.jit
def log1p_of_fraction(x):
    """log(1 + x) for 0 <= x <= 1, to rounding also for tiny x, as 2 * atanh(x / (2 + x)).

    The polynomial is a Chebyshev fit of 2 * atanh(sqrt(w)) / sqrt(w) on [0, 1/9] with relative error 4e-9.
    """
    s = x / (x + 2)
    w = s * s
    p = tl.full(w.shape, 0.28157778, tl.float32)
    p = p * w + 0.27965158
    p = p * w + 0.40024595
    p = p * w + 0.66666322
    p = p * w + 2.0
    return s * p


@triton.jit
def softplus(x):
    """log(1 + exp(x)), which for large x is x itself."""
    # exp2(x * log2 e) is the instruction the hardware has.
    small = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    return tl.maximum(x, 0.0) + log1p_of_fraction(small)
