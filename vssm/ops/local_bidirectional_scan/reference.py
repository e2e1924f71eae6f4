"""The definition of the locally bi-directional scan: one step after the other, differentiable by autograd.

Letters: B batch, D channels, L steps, N states, G groups of B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def local_bidirectional_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    window: int,
) -> Tensor:
    """Sequential scans, B and C (B, G, N, L); returns the output in u's dtype."""
    accumulate = torch.float64 if u.dtype == torch.float64 else torch.float32
    channels, length = u.shape[1:]
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
    behind = []
    for step in range(length):
        state = decay[:, :, step] * state + drive[:, :, step]
        behind.append(state)
    ahead = [torch.zeros_like(state)] * length
    for step in reversed(range(length - 1)):
        if (step + 1) % window:
            ahead[step] = decay[:, :, step] * (ahead[step + 1] + drive[:, :, step + 1])
    y = ((torch.stack(behind, dim=2) + torch.stack(ahead, dim=2)) * C).sum(-1)
    if D is not None:
        y = y + x * D[:, None]
    if z is not None:
        y = y * silu(z.to(accumulate))
    return y.to(u.dtype)
