"""The definition of Mamba-2's scan: one step after the other, any real dtype, differentiable by autograd.

Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """Sequential scan. Returns the output in x's dtype and the final states (B, H, P, N)."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, width = x.shape
    wide, dt = x.to(accumulate), dt.to(accumulate)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    dt = dt.clamp(dt_min, dt_max)
    B, C = (t.to(accumulate).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    state = wide.new_zeros((batch, heads, width, B.shape[3]))
    if initial_states is not None:
        state = state + initial_states
    outputs = []
    for t in range(length):
        drive = (dt[:, t, :, None] * wide[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + drive
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + wide * (D if D.ndim == 2 else D[:, None])
    if z is not None:
        y = y * silu(z.to(accumulate))
    return y.to(x.dtype), state
