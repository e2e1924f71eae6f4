"""The definition of the selective scan: one step after the other, any real dtype, differentiable by autograd.

Letters: B batch, D channels, L steps, N states, G groups of B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Sequential scan; B and C are (B, G, N, L). Returns the output in u's dtype and the last state (B, D, N)."""
    accumulate = torch.float64 if u.dtype == torch.float64 else torch.float32
    channels = u.shape[1]
    x, dt = u.to(accumulate), delta.to(accumulate)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = softplus(dt)
    B = B.to(accumulate).repeat_interleave(channels // B.shape[1], dim=1).transpose(-1, -2)
    C = C.to(accumulate).repeat_interleave(channels // C.shape[1], dim=1).transpose(-1, -2)
    decay = torch.exp(dt[..., None] * A[:, None])
    drive = (dt * x)[..., None] * B
    state = x.new_zeros((u.shape[0], channels, A.shape[1]))
    outputs = []
    # Unbound once: the gradient of one index at a time would fill a whole tensor for every step.
    for decay_now, drive_now, to_output in zip(decay.unbind(2), drive.unbind(2), C.unbind(2), strict=True):
        state = decay_now * state + drive_now
        outputs.append((state * to_output).sum(-1))
    y = torch.stack(outputs, dim=2)
    if D is not None:
        y = y + x * D[:, None]
    if z is not None:
        y = y * silu(z.to(accumulate))
    return y.to(u.dtype), state
