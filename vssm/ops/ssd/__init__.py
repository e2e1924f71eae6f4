"""State-space duality of Mamba-2 (SSD): the public function, its checks and its documentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..checks import check_device, check_dtype, check_shape, check_tensor, under_autocast
from . import op
from .reference import ssd_reference

__all__ = ["ssd"]

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan of Mamba-2, whose decay is one number per head (SSD, arXiv 2405.21060, section 6).

    With s = softplus(dt + dt_bias) (or dt + dt_bias itself) limited to `dt_limit`, for every batch item and head h, and
    B and C of its group h // (heads / groups),
        S[t] = exp(s[t] * A[h]) * S[t-1] + s[t] * x[t] (outer) B[t],      S[-1] = initial_states or 0,
        y[t] = S[t] C[t]  +  D * x[t],
        out[t] = y[t] * silu(z[t]) if z is given, else y[t].
    Argument names and shapes are those of mamba_ssm's mamba_chunk_scan_combined. Accumulated in float32 (float64 for
    float64 inputs); only the inputs are kept for the backward pass. Under autocast everything is computed and returned
    in float32. Differentiable once, in every tensor argument.

    The portable form and the Triton kernels are matrix products over chunks, in the kernels of at most 64 steps. The
    native CPU kernels run the recurrence: on one core with AVX-512 they took 0.15 to 0.3 of the portable time for 16
    states, 0.4 (forward) and 0.7 (backward) for 64, 0.55 and 1 for 128, which is why the backward pass of more than 64
    states is left to the matrix products.

    Args:
        x: input (batch, length, heads, channels of a head); float32, bfloat16, float16 or float64. At least one step,
            head and channel; the batch may be 0.
        dt: step sizes (batch, length, heads), dtype of x or of A.
        A: (heads,), normally negative; float32 (float64 with float64 inputs).
        B, C: (batch, length, groups, states), dtype of x; groups divide the heads.
        chunk_size: most steps per chunk of the portable form, at least 1. Changes time and memory, not the result
            beyond rounding.
        D: skip weight (heads,) or (heads, channels of a head), dtype of A.
        z: gate, shape and dtype of x.
        dt_bias: (heads,), dtype of A.
        dt_softplus: apply softplus to dt + dt_bias.
        initial_states: (batch, heads, channels of a head, states), dtype of A.
        return_final_states: also return S after the last step.
        dt_limit: smallest and largest step size; no gradient passes where it cuts.

    Returns:
        out (batch, length, heads, channels of a head) in x's dtype, contiguous; with `return_final_states` also the
        states (batch, heads, channels of a head, states) in A's dtype.

    Raises:
        ValueError: a shape, dtype, device or setting that does not fit, naming the argument, what came and what is
            needed.
    """
    autocast = under_autocast(x)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    tensors["initial_states"] = initial_states
    check_arguments("ssd", tensors, same_dtype=not autocast)
    _check_settings(chunk_size, dt_limit)
    settings = (dt_softplus, float(dt_limit[0]), float(dt_limit[1]))
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    if backends.reference_in_use():
        x = x.float() if autocast and x.dtype != torch.float64 else x
        out, final_states = ssd_reference(x, *inputs[1:], *settings)
    else:
        out, final_states = op.forward_op(*(t if t is None else t.contiguous() for t in inputs), *settings, chunk_size)
    return (out, final_states) if return_final_states else out


def check_arguments(name: str, tensors: dict[str, Tensor | None], same_dtype: bool) -> None:
    """Raises ValueError unless the tensors of the function `name`, some or all of those of `ssd`, fit together."""
    tensors = {key: t for key, t in tensors.items() if t is not None or key in ("x", "dt", "A", "B", "C")}
    x = tensors["x"]
    for key, tensor in tensors.items():
        check_tensor(name, key, tensor)
        check_device(name, key, tensor, x.device)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}; it must be (batch, length, heads, channels of a head) with at "
            "least one step, head and channel"
        )
    batch, length, heads, width = x.shape
    check_shape(name, "dt", tensors["dt"], (batch, length, heads), "(batch, length, heads)")
    check_shape(name, "A", tensors["A"], (heads,), "(heads,)")
    B = tensors["B"]
    if B.ndim != 4 or B.shape[:2] != x.shape[:2] or 0 in B.shape[2:] or heads % B.shape[2]:
        raise ValueError(
            f"{name}: B has shape {tuple(B.shape)}; it must be (batch, length, groups, states) = ({batch}, {length}, "
            f"groups, states) with groups dividing the {heads} heads and at least one state"
        )
    check_shape(name, "C", tensors["C"], B.shape, "the shape of B")
    if "D" in tensors and tuple(tensors["D"].shape) not in ((heads,), (heads, width)):
        raise ValueError(
            f"{name}: D has shape {tuple(tensors['D'].shape)}; it must be (heads,) = ({heads},) or (heads, channels of "
            f"a head) = ({heads}, {width})"
        )
    if "z" in tensors:
        check_shape(name, "z", tensors["z"], x.shape, "the shape of x")
    if "dt_bias" in tensors:
        check_shape(name, "dt_bias", tensors["dt_bias"], (heads,), "(heads,)")
    if "initial_states" in tensors:
        shape, meaning = (batch, heads, width, B.shape[3]), "(batch, heads, channels of a head, states)"
        check_shape(name, "initial_states", tensors["initial_states"], shape, meaning)

    check_dtype(name, "x", x, _INPUT_DTYPES, "")
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    for key, tensor in tensors.items():
        if key in ("A", "D", "dt_bias", "initial_states"):
            check_dtype(name, key, tensor, (parameter,), f"for x in {str(x.dtype).removeprefix('torch.')}")
        elif not same_dtype:
            check_dtype(name, key, tensor, _INPUT_DTYPES, "")
        else:
            both = key == "dt" and x.dtype != parameter
            check_dtype(name, key, tensor, (x.dtype, parameter) if both else (x.dtype,), "like x")


def _check_settings(chunk_size: int, dt_limit: tuple[float, float]) -> None:
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size!r}; it must be a whole number of steps, at least 1")
    limits = tuple(dt_limit) if isinstance(dt_limit, (tuple, list)) else ()
    if len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(f"ssd: dt_limit is {dt_limit!r}; it must be (smallest, largest) step size")
