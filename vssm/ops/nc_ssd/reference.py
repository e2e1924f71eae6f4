"""The definition of the non-causal scan: a sum over all positions for each one, differentiable by autograd.

Letters: B batch, L positions, H heads, P channels of a head, G groups of B and C, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def nc_ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Position by position; returns the output in x's dtype."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads, groups = x.shape[2], B.shape[2]
    wide, dt = x.to(accumulate), dt.to(accumulate)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    group_of_head = torch.arange(heads, device=x.device) % groups
    B, C = (t.to(accumulate)[:, :, group_of_head] for t in (B, C))
    outputs = []
    for i in range(x.shape[1]):
        share = dt * A * (B * C[:, i, None]).sum(-1)  # of every position j in position i, (B, L, H)
        outputs.append((share[..., None] * wide).sum(1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + wide * (D if D.ndim == 2 else D[:, None])
    return y.to(x.dtype)
