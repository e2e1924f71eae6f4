"""Triton kernels of the selective scan: the walk forward, and the carry of states from segment to segment.

One program is one warp. Its lanes are channels of one group; every lane keeps the N states of its channel in registers
and walks the steps one after the other, a piece of 16 bytes per channel at a time, or of 16 steps if there is one
state. A step costs an exponential and some four other instructions per state, and nothing is exchanged between lanes.
By the count of instructions (7 to 10 per step and state with N = 16, 40 per step with N = 1) an H200 is bound by the
exponentials from N = 16 on and by memory below. Scanning over time across lanes would coalesce the loads of the
(B, D, L) layout, but compiles to twice as many. The price here is that a load touches a line per channel, of which the
next pieces find the rest in the L1 cache.

With a WINDOW, a power of two, the scan is the locally bi-directional one: a step also sees the steps after it in its
window, for which a window is walked back before it is walked forward. A piece may hold several windows. A window of
several pieces leaves what their steps see in a small buffer of the program.

Letters: B batch, D channels, L steps, N states, G groups of B and C, S segments of the sequence.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import columns, softplus, tile_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(channels, group_channels, blocks, segments, LANES: tl.constexpr):
    """What this program works on: batch item, segment, group, the channel of each lane and whether the lane has one."""
    all_blocks = channels // group_channels * blocks
    program = tl.program_id(0)
    block = program % all_blocks
    segment = program // all_blocks % segments
    batch = (program // all_blocks // segments).to(tl.int64)
    group = block // blocks
    first = block % blocks * LANES
    lane = tl.arange(0, LANES)
    # The minimum hides from the compiler how the first channel is aligned. Otherwise it would load A, and with it hold
    # the states, four channels a lane and the states across lanes, and the sums over N would be exchanges.
    channel = tl.minimum(group * group_channels + first, channels - 1) + lane
    return batch, segment, group, channel, first + lane < group_channels


@triton.jit
def load_decay_rates(A, channel, n, channels, mask):
    """A (N, D) times log2 e as (N, lanes), so that exp(dt * A) is exp2 of dt times it; 0 beyond the last state."""
    return tl.load(A + n[:, None] * channels + channel[None, :], mask=mask, other=0.0) * LOG2_E


@triton.jit
def load_float(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_sizes(delta, bias, mask, SOFTPLUS: tl.constexpr):
    """dt of a tile of delta, 0 where there is no step: it then keeps the state and adds nothing."""
    dt = delta.to(tl.float32)
    if bias is not None:
        dt += bias[:, None]
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(mask, dt, 0.0)


@triton.jit
def look_ahead(ahead, dt, drive, B, C, rates, LANES: tl.constexpr, STEPS: tl.constexpr, WINDOW: tl.constexpr):
    """What the steps of a piece see of those after them, a tile (LANES, STEPS), and `ahead` for the piece before.

    `ahead` is s[t] = a[t] * s[t+1] + x[t] of the step after the piece, of which a step sees r[t] = a[t] * s[t+1].
    """
    seen = ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        if (i + 1) % WINDOW == 0:
            ahead = tl.zeros_like(ahead)
        r = ahead * tl.exp2(dt[i][None, :] * rates)
        seen = (tl.sum(r * C[i][:, None], axis=0),) + seen
        ahead = r + drive[i][None, :] * B[i][:, None]
    return tile_of(seen, LANES, STEPS), ahead


@triton.jit
def scan_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    starts,
    seen_ahead,
    out,
    last_state,
    chunk_states,
    channels,
    group_channels,
    blocks,
    units,
    states,
    chunk,
    segment_steps,
    segments,
    UNIT: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """out, chunk states and last state, from `starts` (B, S, N, D), the states each segment starts from, or zero.

    `seen_ahead` (programs, LANES, WINDOW) is the buffer of a WINDOW longer than STEPS, else None.
    """
    length = units * UNIT
    batch, segment, group, channel, real = place(channels, group_channels, blocks, segments, LANES)
    n = tl.arange(0, STATES)
    t = tl.arange(0, STEPS)
    row = batch * channels + channel
    steps = row[:, None] * length + t[None, :]
    group_steps = ((batch * (channels // group_channels) + group) * states + n)[:, None] * length + t[None, :]
    state_mask = (n < states)[:, None] & real[None, :]
    start = segment * segment_steps
    stop = tl.minimum(start + segment_steps, length)
    chunks = tl.cdiv(length, chunk)
    chunk_state = chunk_states + row[None, :] * chunks * states + n[:, None]

    rates = load_decay_rates(A, channel, n, channels, state_mask)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + channel, mask=real, other=0.0)
    if D is not None:
        skip = tl.load(D + channel, mask=real, other=0.0)[:, None]
    h = tl.zeros([STATES, LANES], tl.float32)
    if starts is not None:
        start_row = (batch * segments + segment) * states + n
        h = tl.load(starts + start_row[:, None] * channels + channel[None, :], mask=state_mask, other=0.0)

    if WINDOW > STEPS:
        lane = tl.arange(0, LANES)
        seen_by_step = seen_ahead + (tl.program_id(0).to(tl.int64) * LANES + lane)[:, None] * WINDOW + t[None, :]

    # The loads of a piece are issued a piece ahead, to arrive while the one before is worked on.
    mask = real[:, None] & (start + t < stop)[None, :]
    u_next = tl.load(u + steps + start, mask=mask, other=0.0)
    delta_next = tl.load(delta + steps + start, mask=mask, other=0.0)
    for t0 in range(start, stop, STEPS):
        if t0 % chunk == 0:
            tl.store(chunk_state + t0 // chunk * states, h, mask=state_mask)
        if WINDOW > STEPS:
            if t0 % WINDOW == 0:
                # What one thread stored another may load.
                tl.debug_barrier()
                ahead = tl.zeros([STATES, LANES], tl.float32)
                for backward_piece in range(0, WINDOW // STEPS):
                    offset = WINDOW - (backward_piece + 1) * STEPS
                    later = real[:, None] & (t0 + offset + t < stop)[None, :]
                    group_later = (n < states)[:, None] & (t0 + offset + t < stop)[None, :]
                    dt_tile = step_sizes(
                        tl.load(delta + steps + t0 + offset, mask=later, other=0.0), bias, later, SOFTPLUS
                    )
                    seen, ahead = look_ahead(
                        ahead,
                        columns(dt_tile, LANES, STEPS),
                        columns(dt_tile * load_float(u, steps + t0 + offset, later), LANES, STEPS),
                        columns(load_float(B, group_steps + t0 + offset, group_later), STATES, STEPS),
                        columns(load_float(C, group_steps + t0 + offset, group_later), STATES, STEPS),
                        rates,
                        LANES,
                        STEPS,
                        WINDOW,
                    )
                    tl.store(seen_by_step + offset, seen)
                tl.debug_barrier()
        u_tile = u_next.to(tl.float32)
        dt_tile = step_sizes(delta_next, bias, mask, SOFTPLUS)
        now = mask
        mask = real[:, None] & (t0 + STEPS + t < stop)[None, :]
        u_next = tl.load(u + steps + t0 + STEPS, mask=mask, other=0.0)
        delta_next = tl.load(delta + steps + t0 + STEPS, mask=mask, other=0.0)

        group_mask = (n < states)[:, None] & (t0 + t < stop)[None, :]
        input_weights = columns(load_float(B, group_steps + t0, group_mask), STATES, STEPS)
        output_weights = columns(load_float(C, group_steps + t0, group_mask), STATES, STEPS)
        dt = columns(dt_tile, LANES, STEPS)
        drive = columns(dt_tile * u_tile, LANES, STEPS)
        y = ()
        for i in tl.static_range(STEPS):
            h = h * tl.exp2(dt[i][None, :] * rates) + drive[i][None, :] * input_weights[i][:, None]
            y = y + (tl.sum(h * output_weights[i][:, None], axis=0),)
        y_tile = tile_of(y, LANES, STEPS)
        if WINDOW > STEPS:
            y_tile += tl.load(seen_by_step + t0 % WINDOW)
        elif WINDOW > 1:
            nothing = tl.zeros([STATES, LANES], tl.float32)
            seen, _ = look_ahead(nothing, dt, drive, input_weights, output_weights, rates, LANES, STEPS, WINDOW)
            y_tile += seen
        if D is not None:
            y_tile += skip * u_tile
        if z is not None:
            gate = load_float(z, steps + t0, now)
            y_tile *= gate * tl.sigmoid(gate)
        tl.store(out + steps + t0, y_tile, mask=now)
    if segment == segments - 1:
        tl.store(last_state + row[None, :] * states + n[:, None], h, mask=state_mask)


@triton.jit
def segment_ends_kernel(
    u,
    delta,
    A,
    B,
    delta_bias,
    ends,
    dt_sums,
    channels,
    group_channels,
    blocks,
    units,
    states,
    segment_steps,
    segments,
    UNIT: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """The state (B, S, N, D) each segment would end in had it begun with none, and its sum of dt (B, S, D)."""
    length = units * UNIT
    batch, segment, group, channel, real = place(channels, group_channels, blocks, segments, LANES)
    n = tl.arange(0, STATES)
    t = tl.arange(0, STEPS)
    row = batch * channels + channel
    steps = row[:, None] * length + t[None, :]
    group_steps = ((batch * (channels // group_channels) + group) * states + n)[:, None] * length + t[None, :]
    state_mask = (n < states)[:, None] & real[None, :]
    start = segment * segment_steps
    stop = tl.minimum(start + segment_steps, length)

    rates = load_decay_rates(A, channel, n, channels, state_mask)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + channel, mask=real, other=0.0)
    h = tl.zeros([STATES, LANES], tl.float32)
    dt_sum = tl.zeros([LANES], tl.float32)
    for t0 in range(start, stop, STEPS):
        mask = real[:, None] & (t0 + t < stop)[None, :]
        dt_tile = step_sizes(tl.load(delta + steps + t0, mask=mask, other=0.0), bias, mask, SOFTPLUS)
        drive = columns(dt_tile * load_float(u, steps + t0, mask), LANES, STEPS)
        group_mask = (n < states)[:, None] & (t0 + t < stop)[None, :]
        input_weights = columns(load_float(B, group_steps + t0, group_mask), STATES, STEPS)
        dt = columns(dt_tile, LANES, STEPS)
        for i in tl.static_range(STEPS):
            h = h * tl.exp2(dt[i][None, :] * rates) + drive[i][None, :] * input_weights[i][:, None]
            dt_sum += dt[i]
    segment_row = batch * segments + segment
    tl.store(dt_sums + segment_row * channels + channel, dt_sum, mask=real)
    end_row = segment_row * states + n
    tl.store(ends + end_row[:, None] * channels + channel[None, :], h, mask=state_mask)


@triton.jit
def _compose(decay, end, next_decay, next_end):
    return decay * next_decay, end * next_decay + next_end


@triton.jit
def carry_kernel(
    A,
    ends,
    dt_sums,
    first,
    entering,
    channels,
    sharing,
    states,
    segments,
    REVERSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """What enters each segment when value <- exp(A * sum of dt) * value + end runs over them, from `first` or zero.

    `ends` and `entering` are (B, S, N, D), `dt_sums` (B, S, D), `first` (B, N, D), A (N, D), but `sharing` neighbouring
    channels share their dt and A. With REVERSE the last segment comes first. A program takes CHANNELS channels of one
    state; so few steps are scanned across lanes.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.program_id(0) // blocks % states
    batch = (tl.program_id(0) // blocks // states).to(tl.int64)
    real = channel < channels
    index = tl.arange(0, TILE)
    rates = tl.load(A + n * (channels // sharing) + channel // sharing, mask=real, other=0.0) * LOG2_E
    value = tl.zeros([CHANNELS], tl.float32)
    if first is not None:
        value = tl.load(first + (batch * states + n) * channels + channel, mask=real, other=0.0)
    first_row = batch * segments + (segments - 1 if REVERSE else 0)
    tl.store(entering + (first_row * states + n) * channels + channel, value, mask=real)
    for begin in range(0, segments, TILE):
        order = begin + index
        segment = order
        if REVERSE:
            segment = segments - 1 - order
        mask = (order < segments)[:, None] & real[None, :]
        row = batch * segments + segment
        dt_place = row[:, None] * (channels // sharing) + channel[None, :] // sharing
        dt_sum = tl.load(dt_sums + dt_place, mask=mask, other=0.0)
        end = tl.load(ends + (row * states + n)[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        decay, end = tl.associative_scan((tl.exp2(dt_sum * rates[None, :]), end), 0, _compose)
        after = decay * value[None, :] + end
        # What leaves a segment enters the next in order.
        row = batch * segments + segment + (-1 if REVERSE else 1)
        mask = (order + 1 < segments)[:, None] & real[None, :]
        tl.store(entering + (row * states + n)[:, None] * channels + channel[None, :], after, mask=mask)
        value = tl.sum(tl.where((index == TILE - 1)[:, None], after, 0.0), axis=0)
