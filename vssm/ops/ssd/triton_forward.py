"""Triton kernels of Mamba-2's scan as matrix products (arXiv 2405.21060, section 6): what chunks end in, and outputs.

One program takes a chunk of T steps of one head, so that short sequences of many heads and long ones of few give many
programs alike. Within a chunk y[i] = sum over j <= i of (C[i] . B[j]) * M[i, j] * dt[j] * x[j] with the decay M[i, j]
from step j to step i, to which the state that enters the chunk adds its decayed part. Those states are the only
numbers kept between kernels, N / T for each of x; the carry of them over chunks is that of the selective scan over
segments. Products of tiles are float32 products and are accumulated in float32.

States are saved by boundary, one more than there are chunks: number 0 lies before the first, number S after the last.

Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states, S chunks, T steps of one; i, j
steps of a chunk, the rows and columns of tiles (T, T).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_forward import LOG2_E
from ..tiles import softplus


@triton.jit
def place(heads, chunks, blocks):
    """What this program works on: batch item, chunk, head and block. Heads run before chunks and share B and C."""
    program = tl.program_id(0)
    batch = (program // blocks // heads // chunks).to(tl.int64)
    return batch, program // blocks // heads % chunks, program // blocks % heads, program % blocks


@triton.jit
def load_tile(pointer, row, item, items, size, t, column, real):
    """Steps t from `row` on of one of `items` rows of `size` numbers, which every step has, as float32 (T, columns)."""
    offsets = t[:, None] * (items * size) + column[None, :]
    mask = real[:, None] & (column < size)[None, :]
    return tl.load(pointer + (row * items + item) * size + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_state(pointer, boundary, head, heads, width, states, p, n):
    """A tile (channels, states) of the state of a head at a boundary, counted over the whole batch."""
    mask = (p < width)[:, None] & (n < states)[None, :]
    start = (boundary * heads + head) * width * states
    return tl.load(pointer + start + p[:, None] * states + n[None, :], mask=mask, other=0.0)


@triton.jit
def load_step_sizes(dt, dt_bias, row, head, heads, t, real, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """Step sizes of a chunk (T,) and their derivatives by dt, both 0 where there is no step, which changes nothing."""
    sizes = tl.load(dt + row * heads + head + t * heads, mask=real, other=0.0).to(tl.float32)
    if dt_bias is not None:
        sizes += tl.load(dt_bias + head)
    slope = tl.full(sizes.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = tl.sigmoid(sizes)
        sizes = softplus(sizes)
    slope = tl.where(real & (sizes >= dt_min) & (sizes <= dt_max), slope, 0.0)
    # Unlike minimum and maximum this lets NaN through.
    sizes = tl.where(sizes < dt_min, dt_min, tl.where(sizes > dt_max, dt_max, sizes))
    return tl.where(real, sizes, 0.0), slope


@triton.jit
def exponents(sizes, rate):
    """Exponents of 2 of decays: from before the chunk to each step, rounded and the rest, and from there to the end.

    Differences of the first are those between steps. They are summed in float64 because a short memory after a huge
    step must stay exact.
    """
    logs = (sizes * rate).to(tl.float64)
    sums = tl.cumsum(logs, 0)
    rounded = sums.to(tl.float32)
    return rounded, (sums - rounded.to(tl.float64)).to(tl.float32), (tl.sum(logs, 0) - sums).to(tl.float32)


@triton.jit
def decays_between(rounded, rest, t):
    """M[i, j], the decay from step j to step i (T, T), and 0 for j > i."""
    decays = tl.exp2((rounded[:, None] - rounded[None, :]) + (rest[:, None] - rest[None, :]))
    return tl.where(t[:, None] >= t[None, :], decays, 0.0)


@triton.jit
def chunk_ends_kernel(
    values,
    z,
    dt,
    A,
    weights,
    dt_bias,
    ends,
    dt_sums,
    length,
    heads,
    width,
    groups,
    states,
    chunks,
    dt_min,
    dt_max,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state each chunk would end in had it begun with none: the sum of dt * decay to the end * x (outer) B.

    With REVERSE `values` are the gradients of the output, `weights` are C, and it is the gradient of the state that
    enters the chunk, from its own outputs: the sum of decay from the start * g (outer) C. `ends` (B, S + 1, H, P, N)
    and `dt_sums` (B, S + 1, H) get a row for each chunk, with REVERSE from the second on, as the carry will walk.
    """
    state_blocks = tl.cdiv(states, STATES)
    batch, chunk, head, block = place(heads, chunks, tl.cdiv(width, WIDTH) * state_blocks)
    t = tl.arange(0, STEPS)
    p = block // state_blocks * WIDTH + tl.arange(0, WIDTH)
    n = block % state_blocks * STATES + tl.arange(0, STATES)
    real = chunk * STEPS + t < length
    row = batch * length + chunk * STEPS

    sizes, _ = load_step_sizes(dt, dt_bias, row, head, heads, t, real, dt_min, dt_max, SOFTPLUS)
    from_start, _, to_end = exponents(sizes, tl.load(A + head) * LOG2_E)
    value = load_tile(values, row, head, heads, width, t, p, real)
    if z is not None:
        gate = load_tile(z, row, head, heads, width, t, p, real)
        value *= gate * tl.sigmoid(gate)
    factor = tl.exp2(from_start) if REVERSE else tl.exp2(to_end) * sizes
    weight = load_tile(weights, row, head // (heads // groups), groups, states, t, n, real)
    end = tl.dot(tl.trans(value * factor[:, None]), weight, input_precision=PRECISION)

    place_of_end = (batch * (chunks + 1) + chunk + (1 if REVERSE else 0)) * heads + head
    mask = (p < width)[:, None] & (n < states)[None, :]
    tl.store(ends + place_of_end * width * states + p[:, None] * states + n[None, :], end, mask=mask)
    if block == 0:
        tl.store(dt_sums + place_of_end, tl.sum(sizes, 0))


@triton.jit
def output_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    boundary_states,
    out,
    length,
    heads,
    width,
    groups,
    states,
    chunks,
    dt_min,
    dt_max,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """out from the states at the boundaries (B, S + 1, H, P, N); D is (H, P)."""
    batch, chunk, head, block = place(heads, chunks, tl.cdiv(width, WIDTH))
    group = head // (heads // groups)
    t = tl.arange(0, STEPS)
    p = block * WIDTH + tl.arange(0, WIDTH)
    real = chunk * STEPS + t < length
    row = batch * length + chunk * STEPS
    boundary = batch * (chunks + 1) + chunk

    sizes, _ = load_step_sizes(dt, dt_bias, row, head, heads, t, real, dt_min, dt_max, SOFTPLUS)
    from_start, rest, _ = exponents(sizes, tl.load(A + head) * LOG2_E)
    scores = tl.zeros([STEPS, STEPS], tl.float32)
    y = tl.zeros([STEPS, WIDTH], tl.float32)
    for first in range(0, states, STATES):
        n = first + tl.arange(0, STATES)
        output_weight = load_tile(C, row, group, groups, states, t, n, real)
        input_weight = load_tile(B, row, group, groups, states, t, n, real)
        state = load_state(boundary_states, boundary, head, heads, width, states, p, n)
        scores = tl.dot(output_weight, tl.trans(input_weight), scores, input_precision=EXACT)
        y = tl.dot(output_weight, tl.trans(state), y, input_precision=PRECISION)
    x_tile = load_tile(x, row, head, heads, width, t, p, real)
    weights = scores * decays_between(from_start, rest, t) * sizes[None, :]
    y = tl.dot(weights, x_tile, y * tl.exp2(from_start)[:, None], input_precision=PRECISION)
    if D is not None:
        y += tl.load(D + head * width + p, mask=p < width, other=0.0)[None, :] * x_tile
    if z is not None:
        gate = load_tile(z, row, head, heads, width, t, p, real)
        y *= gate * tl.sigmoid(gate)
    offsets = (row * heads + head) * width + t[:, None] * (heads * width) + p[None, :]
    tl.store(out + offsets, y, mask=real[:, None] & (p < width)[None, :])
