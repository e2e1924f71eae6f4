"""Triton kernels of the scan along routes: the walk forward.

As in the selective scan one program is one warp, a lane one channel, and the states lie in registers; here x is
channels last, so that a step of all lanes is one whole access wherever the table leads. What a step needs of dt, B and
C is the same for all lanes: the lanes share the loading, and pass it on through shared memory. Loads depend on loads
of the table, so both are issued ahead: positions by two pieces, what lies there by one.

A program may walk all routes one after the other and add them up in an output that it alone writes. Where this gives
too few programs, each walks one route, or one segment of it, and writes an output of that route.

With one state, as in VMamba, a step takes about 65 instructions, of which softplus and dt's product are half, and the
issue of instructions sets the pace rather than memory.

Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt, S segments of the routes.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_forward import LOG2_E
from ..tiles import columns, softplus, tile_of


@triton.jit
def place(channels, blocks, walkers, segments, LANES: tl.constexpr, EVEN: tl.constexpr):
    """What this program works on: batch item, segment, walker, block, channel of each lane and whether it has one.

    There are `walkers` programs that share the routes between them. EVEN says that all lanes have a channel.
    """
    program = tl.program_id(0)
    block = program % blocks
    walker = program // blocks % walkers
    segment = program // blocks // walkers % segments
    batch = (program // blocks // walkers // segments).to(tl.int64)
    # The minimum hides from the compiler how the first channel is aligned. Otherwise a lane would load several
    # neighbouring channels of one step instead of several steps of one channel.
    channel = tl.minimum(block * LANES, channels - 1) + tl.arange(0, LANES)
    real = tl.full([LANES], True, tl.int1)
    if not EVEN:
        real = block * LANES + tl.arange(0, LANES) < channels
    return batch, segment, walker, block, channel, real


@triton.jit
def load_positions(order, t, stop, positions, WIDE: tl.constexpr):
    """The positions of steps t of a route, -1 for padding and outside [0, stop); 64 bits if 32 cannot count numbers."""
    position = tl.load(order + t, mask=(t >= 0) & (t < stop), other=-1)
    position = tl.where(position < positions, position, -1)
    if WIDE:
        position = position.to(tl.int64)
    return position


@triton.jit
def load_rows(rows, position, stride, index, mask):
    """A tile (index, steps) of each step's row of `stride` numbers, 0 where there is no position."""
    offsets = position[None, :] * stride + index[:, None]
    return tl.load(rows + offsets, mask=mask[:, None] & (position >= 0)[None, :], other=0.0)


@triton.jit
def load_numbers(rows, position, stride, RANK, STATES, PADDED_RANK: tl.constexpr, PADDED_STATES: tl.constexpr):
    """Tiles of dt in low-rank form, B and C of the steps; with one state a single tile holds them all."""
    r = tl.arange(0, PADDED_RANK)
    n = tl.arange(0, PADDED_STATES)
    if STATES == 1:
        tiles = (load_rows(rows, position, stride, r, r < RANK + 2),)
    else:
        low = load_rows(rows, position, stride, r, r < RANK)
        b = load_rows(rows + RANK, position, stride, n, n < STATES)
        c = load_rows(rows + RANK + STATES, position, stride, n, n < STATES)
        tiles = (low, b, c)
    return tiles


@triton.jit
def pick(tile, ROW: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """One row of a tile (ROWS, LANES). Every lane holds all rows, so that the compiler finds this to be a register."""
    chosen = (tl.arange(0, ROWS) == ROW)[:, None]
    # As integers: adding 0 to them is no instruction.
    bits = tl.broadcast_to(tile, [ROWS, LANES]).to(tl.int32, bitcast=True)
    return tl.sum(tl.where(chosen, bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def step_numbers(
    tiles,
    weights,
    bias,
    RANK,
    STATES,
    PADDED_RANK: tl.constexpr,
    PADDED_STATES: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS of each from the tiles of `load_numbers`: delta (lanes,) with its bias; B; C; the first tile's columns.

    B and C are (N, 1), or (1, lanes) if there is one state. The columns (padded R,) begin with dt in low-rank form.
    """
    rows = columns(tiles[0].to(tl.float32), PADDED_RANK, STEPS)
    delta = ()
    b = ()
    c = ()
    for i in tl.static_range(STEPS):
        row = rows[i][:, None]
        if PADDED_RANK <= 32:
            # A chain of fused multiplications and additions.
            total = bias
            for k in tl.static_range(RANK):
                total += pick(weights, k, PADDED_RANK, LANES) * pick(row, k, PADDED_RANK, LANES)
            delta = delta + (total,)
        else:
            delta = delta + (bias + tl.sum(weights * row, axis=0),)
        if STATES == 1:
            b = b + (pick(row, RANK, PADDED_RANK, LANES)[None, :],)
            c = c + (pick(row, RANK + 1, PADDED_RANK, LANES)[None, :],)
    if STATES > 1:
        b_rows = columns(tiles[1].to(tl.float32), PADDED_STATES, STEPS)
        c_rows = columns(tiles[2].to(tl.float32), PADDED_STATES, STEPS)
        for i in tl.static_range(STEPS):
            b = b + (b_rows[i][:, None],)
            c = c + (c_rows[i][:, None],)
    return delta, b, c, rows


@triton.jit
def load_column(pointer, index, count, stride, column, real):
    """A tile (index, lanes) of a parameter of rows of `stride` numbers, one for each channel of each route."""
    mask = (index < count)[:, None] & real[None, :]
    return tl.load(pointer + index[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def add_rows(rows, position, stride, channel, real, tile, ADD: tl.constexpr):
    """Puts a tile (lanes, steps) into the rows of the steps, or adds it to them."""
    mask = real[:, None] & (position >= 0)[None, :]
    place_of_row = rows + (position[None, :] * stride + channel[:, None])
    if ADD:
        tile += tl.load(place_of_row, mask=mask, other=0.0)
    tl.store(place_of_row, tile, mask=mask)


@triton.jit
def scan_kernel(
    x,
    dt_b_c,
    dt_weight,
    A,
    order,
    D,
    delta_bias,
    starts,
    out,
    chunk_states,
    channels,
    blocks,
    positions,
    length,
    routes,
    walkers,
    chunk,
    segment_steps,
    segments,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_STATES: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    X_ROUTES: tl.constexpr,
    OUT_ROUTES: tl.constexpr,
):
    """out and chunk states, from `starts` (B, S, N, K * D), the states each segment starts from, or zero.

    `dt_weight` is (R, K * D), `A` (N, K * D). With X_ROUTES x is (B, P, K, D), else (B, P, D). So is `out` with
    OUT_ROUTES; without, routes are added up in it, which then is float32 and zero before.
    """
    batch, segment, walker, _block, channel, real = place(channels, blocks, walkers, segments, LANES, EVEN)
    n = tl.arange(0, PADDED_STATES)
    r = tl.arange(0, PADDED_RANK)
    t = tl.arange(0, STEPS)
    row_numbers = routes * (RANK + 2 * STATES)
    x_routes = routes if X_ROUTES else 1
    out_routes = routes if OUT_ROUTES else 1
    start = segment * segment_steps
    stop = tl.minimum(start + segment_steps, length)
    chunks = tl.cdiv(length, chunk)
    state_mask = (n < STATES)[:, None] & real[None, :]
    first_route = walker * (routes // walkers)
    for route in range(first_route, first_route + routes // walkers):
        column = route * channels + channel
        rates = load_column(A, n, STATES, routes * channels, column, real) * LOG2_E
        weights = load_column(dt_weight, r, RANK, routes * channels, column, real)
        bias = tl.zeros([LANES], tl.float32)
        if delta_bias is not None:
            bias = tl.load(delta_bias + column, mask=real, other=0.0)
        if D is not None:
            skip = tl.load(D + column, mask=real, other=0.0)
        h = tl.zeros([PADDED_STATES, LANES], tl.float32)
        if starts is not None:
            segment_row = starts + (batch * segments + segment) * STATES * routes * channels
            h = load_column(segment_row, n, STATES, routes * channels, column, real)

        rows = dt_b_c + (batch * positions * routes + route) * (RANK + 2 * STATES)
        inputs = x + (batch * positions * x_routes + (route if X_ROUTES else 0)) * channels
        outputs = out + (batch * positions * out_routes + (route if OUT_ROUTES else 0)) * channels
        table = order + route * length
        chunk_row = (batch * routes + route) * channels + channel
        chunk_state = chunk_states + chunk_row[None, :] * chunks * STATES + n[:, None]

        position = load_positions(table, start + t, stop, positions, WIDE)
        x_next = load_rows(inputs, position, x_routes * channels, channel, real)
        numbers_next = load_numbers(rows, position, row_numbers, RANK, STATES, PADDED_RANK, PADDED_STATES)
        position_next = load_positions(table, start + STEPS + t, stop, positions, WIDE)
        for t0 in range(start, stop, STEPS):
            if t0 % chunk == 0:
                tl.store(chunk_state + t0 // chunk * STATES, h, mask=state_mask)
            here = position
            inputs_here = columns(x_next.to(tl.float32), LANES, STEPS)
            numbers = numbers_next
            position = position_next
            x_next = load_rows(inputs, position, x_routes * channels, channel, real)
            numbers_next = load_numbers(rows, position, row_numbers, RANK, STATES, PADDED_RANK, PADDED_STATES)
            position_next = load_positions(table, t0 + 2 * STEPS + t, stop, positions, WIDE)

            delta, b, c, _low = step_numbers(
                numbers, weights, bias, RANK, STATES, PADDED_RANK, PADDED_STATES, LANES, STEPS
            )
            y = ()
            for i in tl.static_range(STEPS):
                dt = delta[i]
                if SOFTPLUS:
                    dt = softplus(dt)
                # What follows the last step of a segment is never looked at.
                h = h * tl.exp2(dt[None, :] * rates) + (dt * inputs_here[i])[None, :] * b[i]
                total = tl.sum(h * c[i], axis=0)
                if D is not None:
                    total += skip * inputs_here[i]
                y = y + (total,)
            add_rows(outputs, here, out_routes * channels, channel, real, tile_of(y, LANES, STEPS), not OUT_ROUTES)
        # The next route may reach a position through another thread.
        tl.debug_barrier()


@triton.jit
def segment_ends_kernel(
    x,
    dt_b_c,
    dt_weight,
    A,
    order,
    delta_bias,
    ends,
    dt_sums,
    channels,
    blocks,
    positions,
    length,
    routes,
    walkers,
    segment_steps,
    segments,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_STATES: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    X_ROUTES: tl.constexpr,
):
    """The state (B, S, N, K * D) each segment would end in had it begun with none; its sum of dt (B, S, K * D).

    There is a walker for every route.
    """
    batch, segment, route, _block, channel, real = place(channels, blocks, walkers, segments, LANES, EVEN)
    n = tl.arange(0, PADDED_STATES)
    t = tl.arange(0, STEPS)
    row_numbers = routes * (RANK + 2 * STATES)
    x_routes = routes if X_ROUTES else 1
    start = segment * segment_steps
    stop = tl.minimum(start + segment_steps, length)
    column = route * channels + channel
    rates = load_column(A, n, STATES, routes * channels, column, real) * LOG2_E
    weights = load_column(dt_weight, tl.arange(0, PADDED_RANK), RANK, routes * channels, column, real)
    bias = tl.zeros([LANES], tl.float32)
    if delta_bias is not None:
        bias = tl.load(delta_bias + column, mask=real, other=0.0)
    rows = dt_b_c + (batch * positions * routes + route) * (RANK + 2 * STATES)
    inputs = x + (batch * positions * x_routes + (route if X_ROUTES else 0)) * channels
    table = order + route * length

    h = tl.zeros([PADDED_STATES, LANES], tl.float32)
    dt_sum = tl.zeros([LANES], tl.float32)
    position_next = load_positions(table, start + t, stop, positions, WIDE)
    for t0 in range(start, stop, STEPS):
        position = position_next
        position_next = load_positions(table, t0 + STEPS + t, stop, positions, WIDE)
        inputs_here = columns(
            load_rows(inputs, position, x_routes * channels, channel, real).to(tl.float32), LANES, STEPS
        )
        numbers = load_numbers(rows, position, row_numbers, RANK, STATES, PADDED_RANK, PADDED_STATES)
        delta, b, _c, _low = step_numbers(
            numbers, weights, bias, RANK, STATES, PADDED_RANK, PADDED_STATES, LANES, STEPS
        )
        for i in tl.static_range(STEPS):
            dt = delta[i]
            if SOFTPLUS:
                dt = softplus(dt)
            dt = tl.where(t0 + i < stop, dt, 0.0)
            h = h * tl.exp2(dt[None, :] * rates) + (dt * inputs_here[i])[None, :] * b[i]
            dt_sum += dt
    segment_row = batch * segments + segment
    tl.store(dt_sums + segment_row * routes * channels + column, dt_sum, mask=real)
    end_place = (segment_row * STATES + n)[:, None] * routes * channels + column[None, :]
    tl.store(ends + end_place, h, mask=(n < STATES)[:, None] & real[None, :])
