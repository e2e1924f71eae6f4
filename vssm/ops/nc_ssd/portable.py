"""The non-causal scan as matrix products, for any device and real dtype.

Letters: B batch, L positions, H heads, P channels of a head, G groups of B and C, R heads of a group, N states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ssd.portable import skip_factor, step_size_gradients, step_sizes

_NO_LIMITS = -math.inf, math.inf


class _Inputs:
    """The inputs of one call in the accumulation dtype, by group: head h = r * G + g is number r of group g."""

    def __init__(self, x, dt, A, B, C, dt_bias, dt_softplus):
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.groups = B.shape[2]
        self.A = A.to(self.dtype)
        self.sizes = step_sizes(dt.to(self.dtype), dt_bias, dt_softplus, *_NO_LIMITS)
        self.x = x.to(self.dtype)
        self.weighted = (self.sizes * self.A)[..., None] * self.x
        self.B, self.C = (t.to(self.dtype).transpose(1, 2) for t in (B, C))  # (B, G, L, N)

    def by_group(self, t: Tensor) -> Tensor:
        """(B, L, H, P) -> (B, G, L, R*P)."""
        return t.unflatten(2, (-1, self.groups)).transpose(2, 3).flatten(3).transpose(1, 2)

    def by_head(self, t: Tensor) -> Tensor:
        """(B, G, L, R*P) -> (B, L, H, P)."""
        return t.transpose(1, 2).unflatten(3, (-1, self.x.shape[3])).transpose(2, 3).flatten(2, 3)


def nc_ssd_forward(x, dt, A, B, C, D, dt_bias, dt_softplus):
    """Output (B, L, H, P) in x's dtype."""
    i = _Inputs(x, dt, A, B, C, dt_bias, dt_softplus)
    state = i.B.transpose(-1, -2) @ i.by_group(i.weighted)
    y = i.by_head(i.C @ state)
    if D is not None:
        y = y + i.x * skip_factor(D, i.dtype)
    return y.to(x.dtype).contiguous()


def nc_ssd_backward(grad_out, x, dt, A, B, C, D, dt_bias, dt_softplus):
    """Gradients of all inputs in their dtypes; absent optional inputs give empty tensors."""
    i = _Inputs(x, dt, A, B, C, dt_bias, dt_softplus)
    g = grad_out.to(i.dtype)
    grad, weighted = i.by_group(g), i.by_group(i.weighted)
    state, dstate = i.B.transpose(-1, -2) @ weighted, i.C.transpose(-1, -2) @ grad
    dB, dC = (values @ s.transpose(-1, -2) for values, s in ((weighted, dstate), (grad, state)))
    dweighted = i.by_head(i.B @ dstate)

    dx = (i.sizes * i.A)[..., None] * dweighted
    dweights = (dweighted * i.x).sum(-1)
    ddt = step_size_gradients(dweights * i.A, dt, dt_bias, dt_softplus, *_NO_LIMITS)
    dD = A.new_empty((0,))
    if D is not None:
        dx = dx + g * skip_factor(D, i.dtype)
        dD = (g * i.x).sum((0, 1, 3) if D.ndim == 1 else (0, 1)).to(D.dtype)
    return (
        dx.to(x.dtype).contiguous(),
        ddt.to(dt.dtype).contiguous(),
        (dweights * i.sizes).sum((0, 1)).to(A.dtype),
        dB.transpose(1, 2).to(B.dtype).contiguous(),
        dC.transpose(1, 2).to(C.dtype).contiguous(),
        dD,
        A.new_empty((0,)) if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
    )
