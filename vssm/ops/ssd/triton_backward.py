"""Triton kernels of Mamba-2's scan: gradients, chunk by chunk, from the states that enter chunks and their adjoints.

As in `triton_forward.py` the chunks are independent once the states at the boundaries are known, and with them their
adjoints, which the same carry finds in reverse. The gradients of B and C are sums over the heads of a group: a program
walks some of the heads, adds them up in registers and writes a partial sum, to be added in a fixed order, so that
results do not change from run to run.

The gradient of log M[i, j] belongs to the steps k with j < k <= i. It is summed over i >= k and j < k by sums of terms
as they are, never by differences of longer sums, which would lose the small ones.

Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states, S chunks, T steps of one; i, j
steps of a chunk, the rows and columns of tiles (T, T).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_forward import LOG2_E
from .triton_forward import decays_between, exponents, load_state, load_step_sizes, load_tile, place


@triton.jit
def input_gradients_kernel(
    grad_out,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    boundary_states,
    boundary_adjoints,
    dx,
    ddt,
    dz,
    step_sums,
    skip_sums,
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
    """dx and dz, and partial sums of the other gradients of a head; D is (H, P).

    `ddt` (P blocks, B, L, H); `step_sums` (2, P blocks, B, S, H) of dA and of the bias; `skip_sums` (B, S, H, P) of dD.
    """
    blocks = tl.cdiv(width, WIDTH)
    batch, chunk, head, block = place(heads, chunks, blocks)
    group = head // (heads // groups)
    t = tl.arange(0, STEPS)
    p = block * WIDTH + tl.arange(0, WIDTH)
    real = chunk * STEPS + t < length
    mask = real[:, None] & (p < width)[None, :]
    row = batch * length + chunk * STEPS
    offsets = (row * heads + head) * width + t[:, None] * (heads * width) + p[None, :]
    boundary = batch * (chunks + 1) + chunk

    rate = tl.load(A + head)
    sizes, slope = load_step_sizes(dt, dt_bias, row, head, heads, t, real, dt_min, dt_max, SOFTPLUS)
    from_start, rest, to_end = exponents(sizes, rate * LOG2_E)
    start, end = tl.exp2(from_start), tl.exp2(to_end)

    # C[i] . B[j]; C[i] . state (T, P); adjoint . B[j] (T, P); adjoint . state, which is one number.
    scores = tl.zeros([STEPS, STEPS], tl.float32)
    from_state = tl.zeros([STEPS, WIDTH], tl.float32)
    to_state = tl.zeros([STEPS, WIDTH], tl.float32)
    through = tl.zeros([WIDTH], tl.float32)
    for first in range(0, states, STATES):
        n = first + tl.arange(0, STATES)
        output_weight = load_tile(C, row, group, groups, states, t, n, real)
        input_weight = load_tile(B, row, group, groups, states, t, n, real)
        state = load_state(boundary_states, boundary, head, heads, width, states, p, n)
        adjoint = load_state(boundary_adjoints, boundary + 1, head, heads, width, states, p, n)
        scores = tl.dot(output_weight, tl.trans(input_weight), scores, input_precision=EXACT)
        from_state = tl.dot(output_weight, tl.trans(state), from_state, input_precision=PRECISION)
        to_state = tl.dot(input_weight, tl.trans(adjoint), to_state, input_precision=PRECISION)
        through += tl.sum(adjoint * state, axis=1)
    weights = scores * decays_between(from_start, rest, t)
    from_state *= start[:, None]
    to_state *= end[:, None]

    x_tile = load_tile(x, row, head, heads, width, t, p, real)
    grad = load_tile(grad_out, row, head, heads, width, t, p, real)
    if D is not None:
        skip = tl.load(D + head * width + p, mask=p < width, other=0.0)[None, :]
    g = grad
    if z is not None:
        gate = load_tile(z, row, head, heads, width, t, p, real)
        sigmoid = tl.sigmoid(gate)
        g = grad * gate * sigmoid
        y = tl.dot(weights * sizes[None, :], x_tile, from_state, input_precision=PRECISION)
        if D is not None:
            y += skip * x_tile
        tl.store(dz + offsets, grad * y * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)

    # The gradient of dt * x.
    ddrive = tl.dot(tl.trans(weights), g, to_state, input_precision=PRECISION)
    dx_tile = ddrive * sizes[:, None]
    if D is not None:
        dx_tile += skip * g
    tl.store(dx + offsets, dx_tile, mask=mask)
    tl.store(
        skip_sums + ((batch * chunks + chunk) * heads + head) * width + p, tl.sum(g * x_tile, axis=0), mask=p < width
    )

    # Gradients of logarithms of decays: of M, of those to the end, from the start and over the chunk.
    pairs = weights * tl.dot(g, tl.trans(x_tile), input_precision=PRECISION) * sizes[None, :]
    after = tl.cumsum(pairs, axis=0, reverse=True) + (sizes * tl.sum(to_state * x_tile, axis=1))[None, :]
    dlog = tl.sum(tl.where(t[:, None] > t[None, :], after, 0.0), axis=1)
    dlog += tl.cumsum(tl.sum(from_state * g, axis=1), axis=0, reverse=True)
    dlog += tl.sum(through) * tl.sum(tl.where(t == STEPS - 1, start, 0.0))

    dt_grad = tl.where(slope > 0, (tl.sum(ddrive * x_tile, axis=1) + dlog * rate) * slope, 0.0)
    batches = tl.num_programs(0) // (chunks * heads * blocks)
    partial = block * batches + batch
    tl.store(ddt + (partial * length + chunk * STEPS) * heads + t * heads + head, dt_grad, mask=real)
    place_of_sum = (partial * chunks + chunk) * heads + head
    tl.store(step_sums + place_of_sum, tl.sum(dlog * sizes))
    tl.store(step_sums + tl.num_programs(0) + place_of_sum, tl.sum(dt_grad))


@triton.jit
def group_gradients_kernel(
    grad_out,
    x,
    dt,
    A,
    B,
    C,
    z,
    dt_bias,
    boundary_states,
    boundary_adjoints,
    group_sums,
    length,
    heads,
    width,
    groups,
    states,
    chunks,
    dt_min,
    dt_max,
    head_blocks,
    block_heads,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums (2, head blocks, B, L, G, N) of the gradients of B and C over `block_heads` heads of a group."""
    state_blocks = tl.cdiv(states, STATES)
    batch, chunk, group, block = place(groups, chunks, head_blocks * state_blocks)
    t = tl.arange(0, STEPS)
    n = block % state_blocks * STATES + tl.arange(0, STATES)
    real = chunk * STEPS + t < length
    row = batch * length + chunk * STEPS
    boundary = batch * (chunks + 1) + chunk
    group_heads = heads // groups
    head_block = block // state_blocks
    first_head = group * group_heads + head_block * block_heads
    last_head = tl.minimum(first_head + block_heads, (group + 1) * group_heads)

    dscores = tl.zeros([STEPS, STEPS], tl.float32)
    dB = tl.zeros([STEPS, STATES], tl.float32)
    dC = tl.zeros([STEPS, STATES], tl.float32)
    for head in range(first_head, last_head):
        sizes, _ = load_step_sizes(dt, dt_bias, row, head, heads, t, real, dt_min, dt_max, SOFTPLUS)
        from_start, rest, to_end = exponents(sizes, tl.load(A + head) * LOG2_E)
        start, end = tl.exp2(from_start), tl.exp2(to_end)
        products = tl.zeros([STEPS, STEPS], tl.float32)
        for first in range(0, width, WIDTH):
            p = first + tl.arange(0, WIDTH)
            drive = load_tile(x, row, head, heads, width, t, p, real) * sizes[:, None]
            g = load_tile(grad_out, row, head, heads, width, t, p, real)
            if z is not None:
                gate = load_tile(z, row, head, heads, width, t, p, real)
                g *= gate * tl.sigmoid(gate)
            state = load_state(boundary_states, boundary, head, heads, width, states, p, n)
            adjoint = load_state(boundary_adjoints, boundary + 1, head, heads, width, states, p, n)
            products = tl.dot(g, tl.trans(drive), products, input_precision=PRECISION)
            dB = tl.dot(drive * end[:, None], adjoint, dB, input_precision=PRECISION)
            dC = tl.dot(g * start[:, None], state, dC, input_precision=PRECISION)
        dscores += products * decays_between(from_start, rest, t)
    output_weight = load_tile(C, row, group, groups, states, t, n, real)
    input_weight = load_tile(B, row, group, groups, states, t, n, real)
    dB = tl.dot(tl.trans(dscores), output_weight, dB, input_precision=PRECISION)
    dC = tl.dot(dscores, input_weight, dC, input_precision=PRECISION)

    batches = (tl.num_programs(0) // (chunks * groups * head_blocks * state_blocks)).to(tl.int64)
    size = batches * length * groups * states
    offsets = head_block * size + (row * groups + group) * states + t[:, None] * (groups * states) + n[None, :]
    mask = real[:, None] & (n < states)[None, :]
    tl.store(group_sums + offsets, dB, mask=mask)
    tl.store(group_sums + head_blocks * size + offsets, dC, mask=mask)
