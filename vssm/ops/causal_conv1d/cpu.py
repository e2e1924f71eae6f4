"""The causal depthwise convolution on the native CPU kernels; `op.py` registers it for CPU tensors if they loaded.

Letters: B batch, D channels, L steps, K taps.
"""

from __future__ import annotations

import torch

from .. import native
from . import portable


def forward(x, weight, bias, silu):
    """`vssm::causal_conv1d_forward`: (B, D, L) in x's dtype."""
    # The kernels have no float64.
    if x.dtype not in native.DTYPES:
        return portable.causal_conv1d_forward(x, weight, bias, silu)
    out, weight, bias = torch.empty_like(x), weight.float(), None if bias is None else bias.float()
    native.library.vssm_causal_conv1d_forward(
        native.DTYPES[x.dtype],
        *map(native.address, (x, weight, bias)),
        silu,
        native.address(out),
        *(*x.shape, weight.shape[1], torch.get_num_threads()),
    )
    return out


def backward(grad_out, x, weight, bias, silu):
    """`vssm::causal_conv1d_backward`: gradients of x, weight and bias, the last empty without a bias."""
    # The kernels have no float64.
    if x.dtype not in native.DTYPES:
        return portable.causal_conv1d_backward(grad_out, x, weight, bias, silu)
    weights = weight.float(), None if bias is None else bias.float()
    dx, dweight, dbias = torch.empty_like(x), *(None if w is None else torch.empty_like(w) for w in weights)
    threads = torch.get_num_threads()
    floats = native.library.vssm_causal_conv1d_backward_workspace(x.shape[2], threads)
    workspace = x.new_empty((floats,), dtype=torch.float32)
    native.library.vssm_causal_conv1d_backward(
        native.DTYPES[x.dtype],
        *map(native.address, (grad_out, x, *weights)),
        silu,
        *map(native.address, (dx, dweight, dbias, workspace)),
        *(*x.shape, weight.shape[1], threads),
    )
    return dx, dweight.to(weight.dtype), weight.new_empty((0,)) if bias is None else dbias.to(bias.dtype)
