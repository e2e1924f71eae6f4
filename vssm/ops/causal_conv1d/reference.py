"""The definition of the causal depthwise convolution, differentiable by autograd.

Letters: B batch, D channels, L steps, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, use_silu: bool) -> Tensor:
    """out[t] = bias + sum over k of weight[k] * x[t - (K - 1) + k], then silu if asked; out in x's dtype."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    length, taps = x.shape[2], weight.shape[1]
    padded = pad(x.to(accumulate), (taps - 1, 0))
    out = torch.zeros_like(padded[..., :length])
    for k in range(taps):
        out = out + weight[:, k, None] * padded[..., k : k + length]
    if bias is not None:
        out = out + bias[:, None]
    return (silu(out) if use_silu else out).to(x.dtype)
