"""Selective scan of Mamba (S6): the public function, its checks and its documentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..checks import check_device, check_dtype, check_shape, check_tensor, under_autocast
from . import op
from .onnx import selective_scan_onnx
from .reference import selective_scan_reference

__all__ = ["selective_scan"]

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan (Mamba, arXiv 2312.00752, equation 2 with the discretisation of its section 3.2).

    With dt = softplus(delta + delta_bias) (or delta + delta_bias itself), for every batch item, channel d and state n
        h[t] = exp(dt[t] * A[d, n]) * h[t-1] + dt[t] * B[n, t] * u[t],      h[-1] = 0,
        y[t] = sum over n of C[n, t] * h[t]  +  D[d] * u[t],
        out[t] = y[t] * silu(z[t]) if z is given, else y[t].
    Argument names and shapes are those of mamba_ssm. The state is accumulated in float32 (float64 for float64 inputs).
    Under autocast everything is computed and returned in float32. Differentiable once, in every tensor argument.

    Args:
        u: input (batch, channels, length); float32, bfloat16, float16 or float64. At least one step; batch may be 0.
        delta: step sizes before bias and softplus, shape and dtype of u.
        A: (channels, states), real, normally negative; float32 (float64 with float64 inputs).
        B, C: (batch, states, length) or (batch, groups, states, length), where group g serves the g-th contiguous run
            of channels/groups channels; or (channels, states) when they do not depend on the input (expanded, so that
            their gradients take batch * channels * states * length numbers). Dtype of u. B and C may differ in groups.
        D: skip weight (channels,), dtype of A.
        z: gate, shape and dtype of u.
        delta_bias: (channels,), dtype of A.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return h after the last step.

    Returns:
        out (batch, channels, length) in u's dtype, contiguous; with `return_last_state` also the state
        (batch, channels, states) in A's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument, what came and what is needed.
    """
    autocast = under_autocast(u)
    check_arguments("selective_scan", u, delta, A, B, C, D, z, delta_bias, same_dtype=not autocast)
    B, C = per_group(B, C, u)
    if backends.reference_in_use():
        u = u.float() if autocast and u.dtype != torch.float64 else u
        out, last_state = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    elif torch.onnx.is_in_onnx_export():
        out, last_state = selective_scan_onnx(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        tensors = [t if t is None else t.contiguous() for t in (u, delta, A, B, C, D, z, delta_bias)]
        out, last_state, _ = op.forward_op(*tensors, delta_softplus)
    return (out, last_state) if return_last_state else out


def check_arguments(name: str, u, delta, A, B, C, D, z, delta_bias, same_dtype: bool) -> None:
    """Raises ValueError unless the arguments of the function `name`, a scan of this kind, fit together."""
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    tensors = {key: t for key, t in tensors.items() if t is not None or key in ("u", "delta", "A", "B", "C")}
    for key, tensor in tensors.items():
        check_tensor(name, key, tensor)
        check_device(name, key, tensor, u.device)
    if u.ndim != 3 or 0 in u.shape[1:]:
        raise ValueError(
            f"{name}: u has shape {tuple(u.shape)}; it must be (batch, channels, length) with at least one channel and "
            "one step"
        )
    batch, channels, length = u.shape
    check_shape(name, "delta", delta, u.shape, "the shape of u")
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(
            f"{name}: A has shape {tuple(A.shape)}; it must be (channels, states) with {channels} channels as in u "
            "and at least one state"
        )
    states = A.shape[1]
    for key in ("B", "C"):
        _check_states(name, key, tensors[key], batch, channels, states, length)
    for key in ("D", "delta_bias"):
        if key in tensors:
            check_shape(name, key, tensors[key], (channels,), "(channels,)")
    if z is not None:
        check_shape(name, "z", z, u.shape, "the shape of u")

    check_dtype(name, "u", u, _INPUT_DTYPES, "")
    parameter = torch.float64 if u.dtype == torch.float64 else torch.float32
    for key, tensor in tensors.items():
        if key in ("A", "D", "delta_bias"):
            check_dtype(name, key, tensor, (parameter,), f"for u in {_plain(u.dtype)}")
        elif same_dtype:
            check_dtype(name, key, tensor, (u.dtype,), "like u")
        else:
            check_dtype(name, key, tensor, _INPUT_DTYPES, "")


def _check_states(name: str, key: str, tensor: Tensor, batch: int, channels: int, states: int, length: int) -> None:
    shape = tuple(tensor.shape)
    if tensor.ndim == 4:
        groups = shape[1]
        good = shape == (batch, groups, states, length) and groups > 0 and channels % groups == 0
    elif tensor.ndim == 3:
        good = shape == (batch, states, length)
    else:
        good = shape == (channels, states)
    if not good:
        raise ValueError(
            f"{name}: {key} has shape {shape}; it must be (batch, states, length) = {(batch, states, length)}, or "
            f"(batch, groups, states, length) with groups dividing the {channels} channels, or (channels, states) = "
            f"{(channels, states)}"
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def per_group(B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """B and C as (batch, groups, states, length) with the same number of groups."""
    batch, _, length = u.shape

    def grouped(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x[None, :, :, None].expand(batch, *x.shape, length)
        return x if x.ndim == 4 else x[:, None]

    B, C = grouped(B), grouped(C)
    if B.shape[1] != C.shape[1]:
        groups = math.lcm(B.shape[1], C.shape[1])
        B, C = (x.repeat_interleave(groups // x.shape[1], dim=1) for x in (B, C))
    return B, C
