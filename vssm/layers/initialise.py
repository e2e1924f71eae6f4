"""Initial weights that several papers share."""

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn


def init_linear(module: nn.Module) -> None:
    """For `nn.Module.apply`: linear layers start as a truncated normal of 0.02, with bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_conv_by_fan_out(module: nn.Module) -> None:
    """For `nn.Module.apply`: 2-D convolutions start as a normal of variance 2 / fan-out, with bias 0.

    The fan-out is that of one group, so that of a depthwise convolution is the size of its kernel.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_step_bias(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
    """Fill `bias` so that softplus(bias), Mamba's step size, is log-uniform in [dt_min, dt_max]."""
    dt = bias.uniform_(math.log(dt_min), math.log(dt_max)).exp()
    # Inverse of softplus.
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
