"""Triton kernels of the selective scan: the walk backward.

As in `triton_forward.py` one program is one warp, a lane one channel. A chunk is walked forward from its saved state,
which leaves the states before every piece of STEPS steps in a scratch buffer of the program; then the pieces are walked
backward, the states within a piece being recomputed into registers. With the adjoint lambda[t] = C[t] * g[t] +
message[t], message[t-1] = a[t] * lambda[t] and a[t] * h[t-1] times the adjoint is message[t-1] * h[t-1].

With a WINDOW the walk backward also recomputes what each step sees of those after it, r[t] = a[t] * s[t+1], and the
walk forward the adjoint of s, mu[t+1] = a[t] * (C[t] * g[t] + mu[t]) within a window: x[t] then gets lambda[t] + mu[t],
C[t] meets h[t] + r[t], and dt[t] * A gets (C[t] * g[t] + mu[t]) * r[t] as well.

The gradients of B and C are sums over the channels of a group: a program adds its lanes up and writes partial sums, to
be added in a fixed order, so that results do not change from run to run.

Letters: B batch, D channels, L steps, N states, G groups of B and C, S segments of the sequence.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import columns, stack, sum_over_lanes, tile_of
from .triton_forward import load_decay_rates, load_float, place, step_sizes

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_output_gradient(grad_out, z, offsets, mask):
    """The gradient of the output before the gate."""
    g = load_float(grad_out, offsets, mask)
    if z is not None:
        gate = load_float(z, offsets, mask)
        g *= gate * tl.sigmoid(gate)
    return g


@triton.jit
def backward_kernel(
    grad_out,
    messages,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    chunk_states,
    scratch,
    du,
    ddelta,
    dz,
    channel_sums,
    dA,
    group_sums,
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
    """Gradients of u, delta and z, and partial sums of the others.

    `messages` (B, S, N, D) enter each segment from its end, None for none. Partial sums: `dA` (B, S, N, D),
    `channel_sums` (2, B, S, D) of dD and of the bias, `group_sums` (B, G * blocks, padded L, 2, STATES) of dB and dC.
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

    segment_row = batch * segments + segment
    segment_states = (segment_row * states + n)[:, None] * channels + channel[None, :]

    all_blocks = channels // group_channels * blocks
    block = tl.program_id(0) % all_blocks
    sums = tl.arange(0, 2 * STEPS * STATES)
    group_sum = group_sums + (batch * all_blocks + block) * tl.cdiv(length, STEPS) * STEPS * 2 * STATES + sums
    # Which makes them the lanes from 0, of unknown alignment like the channels, for the layout of the states.
    lane = channel - group * group_channels - block % blocks * LANES
    checkpoint = scratch + n[:, None] * LANES + lane[None, :]
    if WINDOW > STEPS:
        checkpoint += tl.program_id(0).to(tl.int64) * 2 * (chunk // STEPS) * STATES * LANES
        mu_checkpoint = checkpoint + (chunk // STEPS) * STATES * LANES
    else:
        checkpoint += tl.program_id(0).to(tl.int64) * (chunk // STEPS) * STATES * LANES

    rates = load_decay_rates(A, channel, n, channels, state_mask)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + channel, mask=real, other=0.0)
    if D is not None:
        skip = tl.load(D + channel, mask=real, other=0.0)[:, None]
    message = tl.zeros([STATES, LANES], tl.float32)
    if messages is not None:
        message = tl.load(messages + segment_states, mask=state_mask, other=0.0)
    dA_sum = tl.zeros([STATES, LANES], tl.float32)
    dD_sum = tl.zeros([LANES], tl.float32)
    bias_sum = tl.zeros([LANES], tl.float32)
    if WINDOW > 1:
        nothing = tl.zeros([STATES, LANES], tl.float32)
        ahead = nothing

    chunk_start = start + (tl.cdiv(stop - start, chunk) - 1) * chunk
    while chunk_start >= start:
        pieces = tl.cdiv(tl.minimum(chunk, stop - chunk_start), STEPS)
        # Through the scratch buffer, because loaded like this the states would lie across lanes.
        tl.store(checkpoint, tl.load(chunk_state + chunk_start // chunk * states, mask=state_mask, other=0.0))
        tl.debug_barrier()
        h = tl.load(checkpoint)
        if WINDOW > STEPS:
            mu = nothing
        for piece in range(1, pieces):
            t0 = chunk_start + (piece - 1) * STEPS
            mask = real[:, None] & (t0 + t < stop)[None, :]
            group_mask = (n < states)[:, None] & (t0 + t < stop)[None, :]
            dt_tile = step_sizes(tl.load(delta + steps + t0, mask=mask, other=0.0), bias, mask, SOFTPLUS)
            drive = columns(dt_tile * load_float(u, steps + t0, mask), LANES, STEPS)
            input_weights = columns(load_float(B, group_steps + t0, group_mask), STATES, STEPS)
            dt = columns(dt_tile, LANES, STEPS)
            if WINDOW > STEPS:
                g = columns(load_output_gradient(grad_out, z, steps + t0, mask), LANES, STEPS)
                output_weights = columns(load_float(C, group_steps + t0, group_mask), STATES, STEPS)
                mu = tl.where(t0 % WINDOW == 0, 0.0, mu)
            for i in tl.static_range(STEPS):
                decay = tl.exp2(dt[i][None, :] * rates)
                h = h * decay + drive[i][None, :] * input_weights[i][:, None]
                if WINDOW > STEPS:
                    mu = (mu + g[i][None, :] * output_weights[i][:, None]) * decay
            tl.store(checkpoint + piece * STATES * LANES, h)
            if WINDOW > STEPS:
                tl.store(mu_checkpoint + piece * STATES * LANES, mu)
        # What one thread stored another may load.
        tl.debug_barrier()

        for backward_piece in range(0, pieces):
            piece = pieces - 1 - backward_piece
            t0 = chunk_start + piece * STEPS
            mask = real[:, None] & (t0 + t < stop)[None, :]
            group_mask = (n < states)[:, None] & (t0 + t < stop)[None, :]
            u_tile = load_float(u, steps + t0, mask)
            delta_tile = tl.load(delta + steps + t0, mask=mask, other=0.0)
            dt_tile = step_sizes(delta_tile, bias, mask, SOFTPLUS)
            g_tile = load_output_gradient(grad_out, z, steps + t0, mask)
            dt = columns(dt_tile, LANES, STEPS)
            drive = columns(dt_tile * u_tile, LANES, STEPS)
            g = columns(g_tile, LANES, STEPS)
            input_weights = columns(load_float(B, group_steps + t0, group_mask), STATES, STEPS)
            output_weights = columns(load_float(C, group_steps + t0, group_mask), STATES, STEPS)

            states_at = (tl.load(checkpoint + piece * STATES * LANES),)
            for i in tl.static_range(STEPS):
                decay = tl.exp2(dt[i][None, :] * rates)
                states_at = states_at + (states_at[i] * decay + drive[i][None, :] * input_weights[i][:, None],)

            if WINDOW > 1:
                ahead = tl.where((t0 + STEPS) % WINDOW == 0, 0.0, ahead)
                mu_at = (nothing,)
                if WINDOW > STEPS:
                    # The first pieces of windows have stored nothing of use.
                    mu_at = (tl.where(t0 % WINDOW == 0, 0.0, tl.load(mu_checkpoint + piece * STATES * LANES)),)
                for i in tl.static_range(STEPS - 1):
                    if (i + 1) % WINDOW == 0:
                        mu_at = mu_at + (nothing,)
                    else:
                        decay = tl.exp2(dt[i][None, :] * rates)
                        mu_at = mu_at + ((mu_at[i] + g[i][None, :] * output_weights[i][:, None]) * decay,)

            y = ()
            from_input = ()
            from_decay = ()
            addends = ()
            for i in tl.static_range(STEPS - 1, -1, -1):
                direct = g[i][None, :] * output_weights[i][:, None]
                decay = tl.exp2(dt[i][None, :] * rates)
                adjoint = message + direct
                message = adjoint * decay
                carried = message * states_at[i]
                state = states_at[i + 1]
                if WINDOW > 1:
                    if (i + 1) % WINDOW == 0:
                        ahead = nothing
                    r = ahead * decay
                    ahead = r + drive[i][None, :] * input_weights[i][:, None]
                    adjoint += mu_at[i]
                    carried += (mu_at[i] + direct) * r
                    state += r
                dA_sum += carried * dt[i][None, :]
                from_input = (tl.sum(adjoint * input_weights[i][:, None], axis=0),) + from_input
                from_decay = (tl.sum(carried * rates, axis=0),) + from_decay
                if z is not None:
                    y = (tl.sum(state * output_weights[i][:, None], axis=0),) + y
                addends = (adjoint * drive[i][None, :], state * g[i][None, :]) + addends
            addend_tile = stack(addends, STATES, LANES, 2 * STEPS)
            tl.store(group_sum + t0 * 2 * STATES, sum_over_lanes(addend_tile, 2 * STEPS * STATES, LANES))

            from_input_tile = tile_of(from_input, LANES, STEPS)
            du_tile = dt_tile * from_input_tile
            dD_sum += tl.sum(g_tile * u_tile, axis=1)
            if D is not None:
                du_tile += skip * g_tile
            tl.store(du + steps + t0, du_tile, mask=mask)
            ddelta_tile = u_tile * from_input_tile + LN_2 * tile_of(from_decay, LANES, STEPS)
            if SOFTPLUS:
                before = delta_tile.to(tl.float32)
                if delta_bias is not None:
                    before += bias[:, None]
                ddelta_tile *= tl.sigmoid(before)
            ddelta_tile = tl.where(mask, ddelta_tile, 0.0)
            bias_sum += tl.sum(ddelta_tile, axis=1)
            tl.store(ddelta + steps + t0, ddelta_tile, mask=mask)
            if z is not None:
                y_tile = tile_of(y, LANES, STEPS)
                if D is not None:
                    y_tile += skip * u_tile
                gate = load_float(z, steps + t0, mask)
                sigmoid = tl.sigmoid(gate)
                gate_grad = load_float(grad_out, steps + t0, mask) * y_tile * sigmoid * (1 + gate * (1 - sigmoid))
                tl.store(dz + steps + t0, gate_grad, mask=mask)
        tl.debug_barrier()
        chunk_start -= chunk

    place_of_sum = segment_row * channels + channel
    tl.store(channel_sums + place_of_sum, dD_sum, mask=real)
    segment_rows = tl.num_programs(0) // all_blocks
    tl.store(channel_sums + segment_rows * channels + place_of_sum, bias_sum, mask=real)
    tl.store(dA + segment_states, dA_sum, mask=state_mask)


@triton.jit
def segment_messages_kernel(
    grad_out,
    delta,
    A,
    C,
    z,
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
    """The message (B, S, N, D) each segment would pass on had it got none, and its sum of dt (B, S, D)."""
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
    message = tl.zeros([STATES, LANES], tl.float32)
    dt_sum = tl.zeros([LANES], tl.float32)
    for backward_step in range(0, tl.cdiv(stop - start, STEPS)):
        t0 = start + (tl.cdiv(stop - start, STEPS) - 1 - backward_step) * STEPS
        mask = real[:, None] & (t0 + t < stop)[None, :]
        group_mask = (n < states)[:, None] & (t0 + t < stop)[None, :]
        dt = columns(step_sizes(tl.load(delta + steps + t0, mask=mask, other=0.0), bias, mask, SOFTPLUS), LANES, STEPS)
        g = columns(load_output_gradient(grad_out, z, steps + t0, mask), LANES, STEPS)
        output_weights = columns(load_float(C, group_steps + t0, group_mask), STATES, STEPS)
        for i in tl.static_range(STEPS - 1, -1, -1):
            message = (message + g[i][None, :] * output_weights[i][:, None]) * tl.exp2(dt[i][None, :] * rates)
            dt_sum += dt[i]
    segment_row = batch * segments + segment
    tl.store(dt_sums + segment_row * channels + channel, dt_sum, mask=real)
    end_row = segment_row * states + n
    tl.store(ends + end_row[:, None] * channels + channel[None, :], message, mask=state_mask)
