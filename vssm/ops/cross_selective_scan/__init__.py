"""Selective scan along the routes of a map or volume: the public function, its checks and its documentation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import backends
from ..checks import check_device, check_dtype, check_shape, check_tensor, under_autocast
from . import op
from .onnx import cross_selective_scan_onnx
from .reference import cross_selective_scan_reference

__all__ = ["cross_selective_scan"]

_NAME = "cross_selective_scan"
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cross_selective_scan(
    x: Tensor,
    dt_b_c: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    order: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Selective scans of one map or volume along several routes at once (VMamba, arXiv 2401.10166, section 4).

    Route k visits position p = order[k, t] at step t. With (r, B, C) = dt_b_c[p, k] split into R, N and N numbers,
    delta = dt_weight[k] r and dt = softplus(delta + delta_bias[k]) (or delta + delta_bias[k] itself), for every batch
    item, channel d and state n
        h[t] = exp(dt[t] * A[k, d, n]) * h[t-1] + dt[t] * B[n] * x[p],      h[-1] = 0,
        y[k, p] = sum over n of C[n] * h[t]  +  D[k, d] * x[p].
    Everything that is linear in the position is done once for all routes beforehand, and the fused kernels make no
    copy of x, dt or y per route. The state is accumulated in float32 (float64 for float64 inputs). Under autocast
    everything is computed and returned in float32. Differentiable once, in every tensor argument but `order`.

    Args:
        x: inputs, channels last: (batch, positions, channels), the same for all routes, or (batch, positions, routes,
            channels) with channels of its own for every route; float32, bfloat16, float16 or float64. Batch may be 0.
        dt_b_c: (batch, positions, routes, rank + 2 * states), for each position and route the step size in low-rank
            form, B and C; dtype of x.
        dt_weight: (routes, channels, rank); dtype of x, or that of A.
        A: (routes, channels, states), real, normally negative; float32 (float64 with float64 inputs).
        order: int32 (routes, steps): the position that a route visits at each step; -1 is a step of padding, where x
            and dt_b_c are zero (so the state decays and nothing is written). A route must not visit a position twice;
            that is not checked. Values are checked once per table, and not in compiled code.
        D: skip weight (routes, channels), dtype of A.
        delta_bias: (routes, channels), dtype of A.
        delta_softplus: apply softplus to delta + delta_bias.

    Returns:
        y of x's shape and dtype, contiguous: for a shared x the sum over routes, else the output of every route; 0
        where no route passes.

    Raises:
        ValueError: a shape, dtype, device or position that does not fit, naming the argument, what came and what is
            needed.
    """
    autocast = under_autocast(x)
    _check(x, dt_b_c, dt_weight, A, order, D, delta_bias, same_dtype=not autocast)
    _check_positions(order, x.shape[1])
    if backends.reference_in_use():
        x = x.float() if autocast and x.dtype != torch.float64 else x
        return cross_selective_scan_reference(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus)
    if torch.onnx.is_in_onnx_export():
        return cross_selective_scan_onnx(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus)
    tensors = [t if t is None else t.contiguous() for t in (x, dt_b_c, dt_weight, A, order, D, delta_bias)]
    return op.forward_op(*tensors, delta_softplus)[0]


def _check(x, dt_b_c, dt_weight, A, order, D, delta_bias, same_dtype: bool) -> None:
    tensors = {"x": x, "dt_b_c": dt_b_c, "dt_weight": dt_weight, "A": A, "order": order}
    tensors |= {key: t for key, t in {"D": D, "delta_bias": delta_bias}.items() if t is not None}
    for key, tensor in tensors.items():
        check_tensor(_NAME, key, tensor)
        check_device(_NAME, key, tensor, x.device)
    if order.ndim != 2 or 0 in order.shape:
        raise ValueError(
            f"{_NAME}: order has shape {tuple(order.shape)}; it must be (routes, steps) with at least one of each"
        )
    routes = order.shape[0]
    if x.ndim not in (3, 4) or 0 in x.shape[1:] or (x.ndim == 4 and x.shape[2] != routes):
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}; it must be (batch, positions, channels) or (batch, positions, "
            f"routes, channels) with the {routes} routes of order and at least one position and channel"
        )
    batch, positions, channels = *x.shape[:2], x.shape[-1]
    for key, last in (("dt_weight", "rank"), ("A", "states")):
        shape = tuple(tensors[key].shape)
        if len(shape) != 3 or shape[:2] != (routes, channels) or shape[2] == 0:
            raise ValueError(
                f"{_NAME}: {key} has shape {shape}; it must be (routes, channels, {last}) with {routes} routes as in "
                f"order, {channels} channels as in x and a {last} of at least 1"
            )
    numbers = dt_weight.shape[2] + 2 * A.shape[2]
    meaning = "(batch, positions, routes, rank + 2 * states)"
    check_shape(_NAME, "dt_b_c", dt_b_c, (batch, positions, routes, numbers), meaning)
    for key in ("D", "delta_bias"):
        if key in tensors:
            check_shape(_NAME, key, tensors[key], (routes, channels), "(routes, channels)")

    check_dtype(_NAME, "x", x, _INPUT_DTYPES, "")
    check_dtype(_NAME, "order", order, (torch.int32,), "")
    plain = str(x.dtype).removeprefix("torch.")
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    for key in ("A", "D", "delta_bias"):
        if key in tensors:
            check_dtype(_NAME, key, tensors[key], (parameter,), f"for x in {plain}")
    if same_dtype:
        check_dtype(_NAME, "dt_b_c", dt_b_c, (x.dtype,), "like x")
        check_dtype(_NAME, "dt_weight", dt_weight, tuple({x.dtype: 0, parameter: 0}), f"for x in {plain}")
    else:
        check_dtype(_NAME, "dt_b_c", dt_b_c, _INPUT_DTYPES, "")
        check_dtype(_NAME, "dt_weight", dt_weight, _INPUT_DTYPES, "")


# Table -> (its version, smallest and largest value). Reading values of a table on an accelerator waits for the device.
_EXTREMES = WeakIdKeyDictionary()


def _check_positions(order: Tensor, positions: int) -> None:
    # Compilers trace with tensors that have no values. The kernels take any number that is no position for padding.
    if torch.compiler.is_compiling() or type(order) is not Tensor or order.is_meta:
        return
    version = None if order.is_inference() else order._version
    known, *extremes = _EXTREMES.get(order, (-1,))
    if known != version:
        extremes = [value.item() for value in order.aminmax()]
        _EXTREMES[order] = (version, *extremes)
    low, high = extremes
    if low < -1 or high >= positions:
        raise ValueError(
            f"{_NAME}: order has values from {low} to {high}; they must be positions of x, 0 to {positions - 1}, or "
            "-1 for a step of padding"
        )
