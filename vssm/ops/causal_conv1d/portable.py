"""The causal depthwise convolution on PyTorch's own convolution, for any device and real dtype.

Letters: B batch, D channels, L steps, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution before the activation, in the accumulation dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    padded = pad(x.to(dtype), (weight.shape[1] - 1, 0))
    bias = None if bias is None else bias.to(dtype)
    # Inside a backward pass under autocast the convolution would otherwise run in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return conv1d(padded, weight.to(dtype)[:, None], bias, groups=x.shape[1])


def causal_conv1d_forward(x, weight, bias, use_silu):
    """Output (B, D, L) in x's dtype."""
    out = _convolve(x, weight, bias)
    return (silu(out) if use_silu else out).to(x.dtype).contiguous()


def causal_conv1d_backward(grad_out, x, weight, bias, use_silu):
    """Gradients of x, weight and bias in their dtypes; an absent bias gives an empty tensor."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    length, taps = x.shape[2], weight.shape[1]
    grad = grad_out.to(dtype)
    if use_silu:
        out = _convolve(x, weight, bias)
        sigmoid = torch.sigmoid(out)
        grad = grad * sigmoid * (1 + out * (1 - sigmoid))
    padded = pad(x.to(dtype), (taps - 1, 0))
    weight_grad = torch.stack([(grad * padded[..., k : k + length]).sum((0, 2)) for k in range(taps)], dim=1)
    # The adjoint looks ahead in time: the same convolution run on the reversed gradient.
    x_grad = _convolve(grad.flip(2), weight.to(dtype), None).flip(2)
    bias_grad = weight.new_empty((0,)) if bias is None else grad.sum((0, 2)).to(bias.dtype)
    return x_grad.to(x.dtype).contiguous(), weight_grad.to(weight.dtype), bias_grad
