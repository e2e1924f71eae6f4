"""Initial weights that several papers share."""

from timm.layers import trunc_normal_
from torch import nn


def init_linear(module: nn.Module) -> None:
    """For `nn.Module.apply`: linear layers start as a truncated normal of 0.02, with bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
