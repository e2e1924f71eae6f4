"""Causal depthwise 1-D convolution of Mamba: the public function, its checks and its documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..checks import check_device, check_dtype, check_shape, check_tensor
from . import op
from .portable import causal_conv1d_forward
from .reference import causal_conv1d_reference

__all__ = ["causal_conv1d"]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Depthwise convolution along the sequence that looks only back (Mamba, arXiv 2312.00752, section 3.4).

    out[b, d, t] = act(bias[d] + sum over k of weight[d, k] * x[b, d, t - (taps - 1) + k]), with zeros before the start.
    Sums are taken in float32 (float64 for float64 x). Argument names are those of the causal_conv1d package.

    Args:
        x: (batch, channels, length); float32, bfloat16, float16 or float64. At least one step; the batch may be 0.
        weight: (channels, taps), dtype of x or float32.
        bias: (channels,), dtype of weight.
        activation: None or "silu" (also spelled "swish").

    Returns:
        (batch, channels, length) in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit, saying what came and what is needed.
    """
    name = "causal_conv1d"
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for key, tensor in tensors.items():
        check_tensor(name, key, tensor)
        check_device(name, key, tensor, x.device)
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}; it must be (batch, channels, length) with at least one channel and "
            "one step"
        )
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}; it must be (channels, taps) with {x.shape[1]} channels "
            "as in x and at least one tap"
        )
    check_dtype(name, "x", x, (torch.float32, torch.bfloat16, torch.float16, torch.float64), "")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_dtype(
        name, "weight", weight, dict.fromkeys((x.dtype, wide)), f"for x in {str(x.dtype).removeprefix('torch.')}"
    )
    if bias is not None:
        check_shape(name, "bias", bias, (x.shape[1],), "(channels,)")
        check_dtype(name, "bias", bias, (weight.dtype,), "like weight")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{name}: activation is {activation!r}; it must be None or 'silu'")

    silu = activation is not None
    if backends.reference_in_use():
        return causal_conv1d_reference(x, weight, bias, silu)
    if torch.onnx.is_in_onnx_export():
        return causal_conv1d_forward(x, weight, bias, silu)
    return op.forward_op(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), silu)
