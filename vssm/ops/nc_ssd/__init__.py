"""Non-causal state-space duality of VSSD (NC-SSD): the public function, its checks and its documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..checks import under_autocast
from ..ssd import check_arguments
from . import op
from .reference import nc_ssd_reference

__all__ = ["nc_ssd"]


def nc_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Mamba-2's scan without an order: every position sees the same sum over all (NC-SSD of VSSD, arXiv 2407.18559).

    With s = softplus(dt + dt_bias) (or dt + dt_bias itself), for every batch item and head h, and B and C of its group
    h mod groups,
        S = sum over all positions j of s[j] * A[h] * B[j] (outer) x[j],
        y[i] = S^T C[i]  +  D * x[i].
    No decay, no mask, no normalisation. Two things differ from `ssd`: A multiplies, so that VSSD passes exp(A_log)
    where Mamba-2 passes -exp(A_log), and groups are dealt out to heads in turn, as in VSSD's code (its published models
    have one group). The gate and the norm that follow in VSSD are not part of the op.
    Accumulated in float32 (float64 for float64 inputs); only the inputs are kept for the backward pass. Under autocast
    everything is computed and returned in float32. Differentiable once, in every tensor argument.

    Args:
        x: input (batch, length, heads, channels of a head); float32, bfloat16, float16 or float64. At least one
            position, head and channel; the batch may be 0.
        dt: weights of the positions (batch, length, heads), dtype of x or of A.
        A: (heads,), normally positive; float32 (float64 with float64 inputs).
        B, C: (batch, length, groups, states), dtype of x; groups divide the heads.
        D: skip weight (heads,) or (heads, channels of a head), dtype of A.
        dt_bias: (heads,), dtype of A.
        dt_softplus: apply softplus to dt + dt_bias.

    Returns:
        (batch, length, heads, channels of a head) in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument, what came and what is needed.
    """
    autocast = under_autocast(x)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    check_arguments("nc_ssd", tensors, same_dtype=not autocast)
    if backends.reference_in_use():
        tensors["x"] = x.float() if autocast and x.dtype != torch.float64 else x
        return nc_ssd_reference(*tensors.values(), dt_softplus)
    return op.forward_op(*(t if t is None else t.contiguous() for t in tensors.values()), dt_softplus)
