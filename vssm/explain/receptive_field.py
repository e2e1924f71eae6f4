"""Effective receptive field (Luo, Li, Urtasun, Zemel, arXiv 1701.04128): which pixels move one unit of the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def effective_receptive_field(
    model: nn.Module, images: Tensor, index: int = -1, position: tuple[int, int] | None = None
) -> Tensor:
    """Mean over images of the absolute gradient, summed over colours, of the features at one place of a map.

    Args:
        model: a timm model with `forward_intermediates`, as all of vssm's; put it into evaluation mode first.
        images: (B, C, H, W); a few dozen give a smooth picture.
        index: which of the model's intermediate maps.
        position: (row, column) in that map; its centre if None.

    Returns:
        float tensor (H, W), non-negative.

    Raises:
        ValueError: the position lies outside the map.
    """
    with torch.enable_grad():
        pixels = images.detach().clone().requires_grad_()
        count = len(model.forward_intermediates(pixels[:1].detach(), intermediates_only=True))
        features = model.forward_intermediates(pixels, indices=[index % count], intermediates_only=True)[0]
        height, width = features.shape[2:]
        row, column = (height // 2, width // 2) if position is None else position
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"position {(row, column)} lies outside the map of {height} x {width}")
        (gradient,) = torch.autograd.grad(features[:, :, row, column].sum(), pixels)
    return gradient.abs().sum(1).mean(0)
