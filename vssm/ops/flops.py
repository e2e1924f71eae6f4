"""Floating-point operations of every op, registered with `torch.utils.flop_counter` and given to fvcore on request.

Scans are counted as the papers of the family do: 9 operations per batch item, step, channel and state for dt * A, its
exponential, dt * B * u, the recurrence and the sum with C, and one per element for each of D and z. A look ahead adds
3 per state: the product with the decay, the sum with the input and the sum with the state. Convolutions and matrix
products count 2 per multiplication and addition. Those of `ssd` are the products of its portable form, with the chunks
and the padding that it makes, whichever kernel runs. The backward pass of a scan or convolution counts twice its
forward pass, that of matrix products its own products. Biases, softplus, gradients of the gate and additions of results
are not counted.

Letters: B batch, D channels, L steps, N states, K taps, H heads, P channels of a head, G groups of B and C.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from . import backends
from .ssd.portable import chunk_sizes


def _scan(per_state: int, u, A, D, z) -> int:
    return prod(u) * (per_state * A[1] + (D is not None) + (z is not None))


def selective_scan_forward(u, delta, A, B, C, D, z, *_, **__) -> int:
    """9*B*L*D*N, and B*L*D for each of D and z."""
    return _scan(9, u, A, D, z)


def selective_scan_backward(grad_out, grad_last_state, *inputs, **__) -> int:
    """Twice the forward pass."""
    return 2 * selective_scan_forward(*inputs)


def local_bidirectional_scan_forward(u, delta, A, B, C, D, z, *_, **__) -> int:
    """12*B*L*D*N, and B*L*D for each of D and z."""
    return _scan(12, u, A, D, z)


def local_bidirectional_scan_backward(grad_out, *inputs, **__) -> int:
    """Twice the forward pass."""
    return 2 * local_bidirectional_scan_forward(*inputs)


def cross_selective_scan_forward(x, dt_b_c, dt_weight, A, order, D, *_, **__) -> int:
    """9*B*K*L*D*N and, with K routes and rank R, 2*B*K*L*D*R for the step sizes and B*K*L*D for D."""
    routes, channels, states = A
    return x[0] * routes * order[1] * channels * (9 * states + 2 * dt_weight[2] + (D is not None))


def cross_selective_scan_backward(grad_y, *inputs, **__) -> int:
    """Twice the forward pass."""
    return 2 * cross_selective_scan_forward(*inputs)


def causal_conv1d_forward(x, weight, *_, **__) -> int:
    """2*B*D*L*K."""
    return 2 * prod(x) * weight[1]


def causal_conv1d_backward(grad_out, x, weight, *_, **__) -> int:
    """Twice the forward pass."""
    return 2 * causal_conv1d_forward(x, weight)


def _ssd_products(x, B, chunk_size: int) -> tuple[int, int, int]:
    """Operations of one product of each kind: steps with steps over states, over channels, and steps with states."""
    batch, length, heads, width = x
    groups, states = B[2:]
    count, steps = chunk_sizes(length, chunk_size)
    pairs = 2 * batch * count * steps**2
    return pairs * groups * states, pairs * heads * width, 2 * batch * count * steps * heads * width * states


def ssd_forward(x, dt, A, B, C, *others, **__) -> int:
    """C.B and its product with x in every chunk, the states of chunks and their product with C."""
    scores, within, states = _ssd_products(x, B, others[-1])
    return scores + within + 2 * states


def ssd_backward(grad_out, grad_final_states, x, dt, A, B, C, D, z, *others, **__) -> int:
    """The matrix products of the backward pass, recomputed ones included; the output again only with z."""
    scores, within, states = _ssd_products(x, B, others[-1])
    return 3 * scores + (2 + (z is not None)) * within + 6 * states


def nc_ssd_forward(x, dt, A, B, *_, **__) -> int:
    """4*B*L*H*P*N."""
    return 4 * prod(x) * B[3]


def nc_ssd_backward(grad_out, x, dt, A, B, *_, **__) -> int:
    """10*B*L*H*P*N."""
    return 10 * prod(x) * B[3]


def cross_selective_scan_as_in_papers(x, dt_b_c, dt_weight, A, order, D, *_, **__) -> int:
    """As `cross_selective_scan_forward`, but the product that makes the step sizes counts one for a multiply-add."""
    routes, channels, states = A
    return x[0] * routes * order[1] * channels * (9 * states + dt_weight[2] + (D is not None))


FORMULAS = {
    formula.__name__: formula
    for formula in (
        selective_scan_forward,
        selective_scan_backward,
        local_bidirectional_scan_forward,
        local_bidirectional_scan_backward,
        cross_selective_scan_forward,
        cross_selective_scan_backward,
        causal_conv1d_forward,
        causal_conv1d_backward,
        ssd_forward,
        ssd_backward,
        nc_ssd_forward,
        nc_ssd_backward,
    )
}
# Scans in papers' operations, where a multiplication with its addition is one operation in products but not in a scan.
PAPERS = {
    "selective_scan_forward": selective_scan_forward,
    "local_bidirectional_scan_forward": local_bidirectional_scan_forward,
    "cross_selective_scan_forward": cross_selective_scan_as_in_papers,
}

backends._ops()  # defines the ops
for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(torch.ops.vssm, _name))(_formula)


def fvcore_handles() -> dict[str, Callable[[list, list], int]]:
    """Handles that make fvcore count the ops of this package.

    Use: `FlopCountAnalysis(model, inputs).set_op_handle(**fvcore_handles())`. Where fvcore counts a multiplication and
    its addition as one, for convolutions and matrix products, these handles do so too: half of what
    `torch.utils.flop_counter` shows. Scans count the same in both, which is how the papers add them up.
    """
    forward = {name: formula for name, formula in FORMULAS.items() if name.endswith("_forward")}
    return {
        f"vssm::{name}": _handle(PAPERS[name], 1) if name in PAPERS else _handle(formula, 2)
        for name, formula in forward.items()
    }


def _handle(formula: Callable[..., int], divisor: int) -> Callable[[list, list], int]:
    def value(traced):
        """The shape of a tensor, any other argument as it is."""
        return traced.type().sizes() if traced.isCompleteTensor() else traced.toIValue()

    return lambda inputs, outputs: formula(*map(value, inputs)) // divisor
