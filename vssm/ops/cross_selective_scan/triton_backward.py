"""Triton kernels of the scan along routes: the walk backward.

The method is that of the selective scan's backward pass: a chunk is walked forward from its saved state, leaving states
in a scratch buffer, then backward a piece at a time. The gradient of x is added up over routes like the output of the
forward pass. That of `dt_b_c` is a sum over channels: every block of channels writes its part, at the positions.

Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt, S segments of the routes.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_backward import LN_2
from ..selective_scan.triton_forward import LOG2_E
from ..tiles import columns, softplus, stack, sum_over_lanes, tile_of
from .triton_forward import add_rows, load_column, load_numbers, load_positions, load_rows, place, step_numbers


@triton.jit
def step_size(delta, inside, SOFTPLUS: tl.constexpr):
    """dt of one step, 0 where there is none: it then passes on states and messages as they are."""
    dt = delta
    if SOFTPLUS:
        dt = softplus(delta)
    return tl.where(inside, dt, 0.0)


@triton.jit
def store_sums(
    parts,
    rows,
    count,
    table,
    t0,
    stop,
    positions,
    stride,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums STEPS tiles (ROWS, lanes) over the lanes, into the first `count` numbers of each step's row."""
    JOINED: tl.constexpr = STEPS if ROWS * STEPS <= 64 else 1
    index = tl.arange(0, JOINED * ROWS)
    for first in tl.static_range(0, STEPS, JOINED):
        joined = ()
        for i in tl.static_range(JOINED):
            joined = joined + (parts[first + i],)
        sums = sum_over_lanes(stack(joined, ROWS, LANES, JOINED), JOINED * ROWS, LANES)
        position = load_positions(table, t0 + first + index // ROWS, stop, positions, WIDE)
        row = index % ROWS
        tl.store(rows + (position * stride + row), sums, mask=(position >= 0) & (row < count))


@triton.jit
def backward_kernel(
    grad_y,
    messages,
    x,
    dt_b_c,
    dt_weight,
    A,
    order,
    D,
    delta_bias,
    chunk_states,
    scratch,
    dx,
    number_sums,
    weight_sums,
    dA,
    channel_sums,
    channels,
    blocks,
    batches,
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
    """The gradient of x like the output of the forward pass, and partial sums of the others.

    `messages` (B, S, N, K * D) enter each segment from its end, None for none. Partial sums: `number_sums` (blocks, B,
    P, K, R + 2 N) of d(dt_b_c), `weight_sums` (B, S, R, K * D) of d(dt_weight), `dA` (B, S, N, K * D) and
    `channel_sums` (2, B, S, K * D) of dD and of the bias. `grad_y` has the shape of x.
    """
    batch, segment, walker, block, channel, real = place(channels, blocks, walkers, segments, LANES, EVEN)
    n = tl.arange(0, PADDED_STATES)
    r = tl.arange(0, PADDED_RANK)
    t = tl.arange(0, STEPS)
    numbers_each = RANK + 2 * STATES
    row_numbers = routes * numbers_each
    x_routes = routes if X_ROUTES else 1
    out_routes = routes if OUT_ROUTES else 1
    all_columns = routes * channels
    start = segment * segment_steps
    stop = tl.minimum(start + segment_steps, length)
    chunks = tl.cdiv(length, chunk)
    state_mask = (n < STATES)[:, None] & real[None, :]
    segment_row = batch * segments + segment
    # The lanes from 0, of unknown alignment like the channels, for the layout of the states.
    checkpoint = scratch + tl.program_id(0).to(tl.int64) * (chunk // STEPS) * PADDED_STATES * LANES
    checkpoint += n[:, None] * LANES + (channel - block * LANES)[None, :]

    first_route = walker * (routes // walkers)
    for route in range(first_route, first_route + routes // walkers):
        column = route * channels + channel
        rates = load_column(A, n, STATES, all_columns, column, real) * LOG2_E
        weights = load_column(dt_weight, r, RANK, all_columns, column, real)
        bias = tl.zeros([LANES], tl.float32)
        if delta_bias is not None:
            bias = tl.load(delta_bias + column, mask=real, other=0.0)
        if D is not None:
            skip = tl.load(D + column, mask=real, other=0.0)
        message = tl.zeros([PADDED_STATES, LANES], tl.float32)
        if messages is not None:
            message = load_column(messages + segment_row * STATES * all_columns, n, STATES, all_columns, column, real)
        weight_sum = tl.zeros([PADDED_RANK, LANES], tl.float32)
        dA_sum = tl.zeros([PADDED_STATES, LANES], tl.float32)
        dD_sum = tl.zeros([LANES], tl.float32)
        bias_sum = tl.zeros([LANES], tl.float32)

        rows = dt_b_c + (batch * positions * routes + route) * numbers_each
        sum_rows = number_sums + ((block * batches + batch) * positions * routes + route) * numbers_each
        x_place = (batch * positions * x_routes + (route if X_ROUTES else 0)) * channels
        out_place = (batch * positions * out_routes + (route if OUT_ROUTES else 0)) * channels
        table = order + route * length
        chunk_row = (batch * routes + route) * channels + channel
        chunk_state = chunk_states + chunk_row[None, :] * chunks * STATES + n[:, None]

        chunk_start = start + (tl.cdiv(stop - start, chunk) - 1) * chunk
        while chunk_start >= start:
            pieces = tl.cdiv(tl.minimum(chunk, stop - chunk_start), STEPS)
            # Through the scratch buffer, because loaded like this the states would lie across lanes.
            tl.store(checkpoint, tl.load(chunk_state + chunk_start // chunk * STATES, mask=state_mask, other=0.0))
            tl.debug_barrier()
            h = tl.load(checkpoint)
            position_next = load_positions(table, chunk_start + t, stop, positions, WIDE)
            for piece in range(1, pieces):
                position = position_next
                position_next = load_positions(table, chunk_start + piece * STEPS + t, stop, positions, WIDE)
                x_tile = load_rows(x + x_place, position, x_routes * channels, channel, real)
                inputs = columns(x_tile.to(tl.float32), LANES, STEPS)
                numbers = load_numbers(rows, position, row_numbers, RANK, STATES, PADDED_RANK, PADDED_STATES)
                delta, b, _c, _low = step_numbers(
                    numbers, weights, bias, RANK, STATES, PADDED_RANK, PADDED_STATES, LANES, STEPS
                )
                for i in tl.static_range(STEPS):
                    dt = step_size(delta[i], True, SOFTPLUS)
                    h = h * tl.exp2(dt[None, :] * rates) + (dt * inputs[i])[None, :] * b[i]
                tl.store(checkpoint + piece * PADDED_STATES * LANES, h)
            # What one thread stored another may load.
            tl.debug_barrier()

            position_next = load_positions(table, chunk_start + (pieces - 1) * STEPS + t, stop, positions, WIDE)
            for backward_piece in range(0, pieces):
                piece = pieces - 1 - backward_piece
                t0 = chunk_start + piece * STEPS
                position = position_next
                position_next = load_positions(table, t0 - STEPS + t, stop, positions, WIDE)
                x_tile = load_rows(x + x_place, position, x_routes * channels, channel, real)
                g_tile = load_rows(grad_y + x_place, position, x_routes * channels, channel, real)
                inputs = columns(x_tile.to(tl.float32), LANES, STEPS)
                g = columns(g_tile.to(tl.float32), LANES, STEPS)
                numbers = load_numbers(rows, position, row_numbers, RANK, STATES, PADDED_RANK, PADDED_STATES)
                delta, b, c, low = step_numbers(
                    numbers, weights, bias, RANK, STATES, PADDED_RANK, PADDED_STATES, LANES, STEPS
                )
                dt = ()
                states_at = (tl.load(checkpoint + piece * PADDED_STATES * LANES),)
                for i in tl.static_range(STEPS):
                    dt = dt + (step_size(delta[i], t0 + i < stop, SOFTPLUS),)
                    decay = tl.exp2(dt[i][None, :] * rates)
                    states_at = states_at + (states_at[i] * decay + (dt[i] * inputs[i])[None, :] * b[i],)

                du = ()
                low_parts = ()
                b_parts = ()
                c_parts = ()
                for i in tl.static_range(STEPS - 1, -1, -1):
                    adjoint = message + g[i][None, :] * c[i]
                    message = adjoint * tl.exp2(dt[i][None, :] * rates)
                    carried = message * states_at[i]
                    dA_sum += carried * dt[i][None, :]
                    from_input = tl.sum(adjoint * b[i], axis=0)
                    ddelta = inputs[i] * from_input + LN_2 * tl.sum(carried * rates, axis=0)
                    if SOFTPLUS:
                        ddelta *= tl.sigmoid(delta[i])
                    ddelta = tl.where(t0 + i < stop, ddelta, 0.0)
                    bias_sum += ddelta
                    dD_sum += g[i] * inputs[i]
                    weight_sum += ddelta[None, :] * low[i][:, None]
                    total = dt[i] * from_input
                    if D is not None:
                        total += skip * g[i]
                    du = (total,) + du
                    low_part = weights * ddelta[None, :]
                    b_part = adjoint * (dt[i] * inputs[i])[None, :]
                    c_part = states_at[i + 1] * g[i][None, :]
                    if STATES == 1:
                        # The row of a step is whole in one tile.
                        low_part = tl.where((r == RANK)[:, None], b_part, low_part)
                        low_part = tl.where((r == RANK + 1)[:, None], c_part, low_part)
                    low_parts = (low_part,) + low_parts
                    b_parts = (b_part,) + b_parts
                    c_parts = (c_part,) + c_parts

                du_tile = tile_of(du, LANES, STEPS)
                add_rows(dx + out_place, position, out_routes * channels, channel, real, du_tile, not OUT_ROUTES)
                where = (table, t0, stop, positions, row_numbers)
                if STATES == 1:
                    store_sums(low_parts, sum_rows, RANK + 2, *where, PADDED_RANK, LANES, STEPS, WIDE)
                else:
                    c_rows = sum_rows + RANK + STATES
                    store_sums(low_parts, sum_rows, RANK, *where, PADDED_RANK, LANES, STEPS, WIDE)
                    store_sums(b_parts, sum_rows + RANK, STATES, *where, PADDED_STATES, LANES, STEPS, WIDE)
                    store_sums(c_parts, c_rows, STATES, *where, PADDED_STATES, LANES, STEPS, WIDE)
            tl.debug_barrier()
            chunk_start -= chunk

        place_of_sum = segment_row * all_columns + column
        tl.store(channel_sums + place_of_sum, dD_sum, mask=real)
        tl.store(channel_sums + batches * segments * all_columns + place_of_sum, bias_sum, mask=real)
        dA_place = (segment_row * STATES + n)[:, None] * all_columns + column[None, :]
        tl.store(dA + dA_place, dA_sum, mask=state_mask)
        weight_place = (segment_row * RANK + r)[:, None] * all_columns + column[None, :]
        tl.store(weight_sums + weight_place, weight_sum, mask=(r < RANK)[:, None] & real[None, :])


@triton.jit
def segment_messages_kernel(
    grad_y,
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
    """The message (B, S, N, K * D) each segment would pass on had it got none; its sum of dt (B, S, K * D).

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
    grads = grad_y + (batch * positions * x_routes + (route if X_ROUTES else 0)) * channels
    table = order + route * length

    message = tl.zeros([PADDED_STATES, LANES], tl.float32)
    dt_sum = tl.zeros([LANES], tl.float32)
    pieces = tl.cdiv(stop - start, STEPS)
    position_next = load_positions(table, start + (pieces - 1) * STEPS + t, stop, positions, WIDE)
    for backward_piece in range(0, pieces):
        t0 = start + (pieces - 1 - backward_piece) * STEPS
        position = position_next
        position_next = load_positions(table, t0 - STEPS + t, stop, positions, WIDE)
        g = columns(load_rows(grads, position, x_routes * channels, channel, real).to(tl.float32), LANES, STEPS)
        numbers = load_numbers(rows, position, row_numbers, RANK, STATES, PADDED_RANK, PADDED_STATES)
        delta, _b, c, _low = step_numbers(
            numbers, weights, bias, RANK, STATES, PADDED_RANK, PADDED_STATES, LANES, STEPS
        )
        for i in tl.static_range(STEPS - 1, -1, -1):
            dt = step_size(delta[i], t0 + i < stop, SOFTPLUS)
            message = (message + g[i][None, :] * c[i]) * tl.exp2(dt[None, :] * rates)
            dt_sum += dt
    segment_row = batch * segments + segment
    tl.store(dt_sums + segment_row * routes * channels + column, dt_sum, mask=real)
    end_place = (segment_row * STATES + n)[:, None] * routes * channels + column[None, :]
    tl.store(ends + end_place, message, mask=(n < STATES)[:, None] & real[None, :])
