"""Stems and downsampling of hierarchical backbones, all on maps (B, C, H, W).

Letters: B batch, C channels, H height, W width.
"""

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerNorm2d
from torch import Tensor, nn

EPS = 1e-5


def channels_last(x: Tensor) -> Tensor:
    """The same map (B, C, H, W) with the channels of a pixel side by side in memory, where the norms work on them."""
    return x.contiguous(memory_format=torch.channels_last)


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2: images (B, in_chans, H, W) -> (B, dim, H/4, W/4), sizes rounded up."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = LayerNorm2d(dim // 2, eps=EPS)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = LayerNorm2d(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(channels_last(x))))
        return self.norm2(self.conv2(x))


class PatchStem(nn.Module):
    """Non-overlapping 4x4 patches: images (B, in_chans, H, W) -> (B, dim, H/4, W/4), sizes rounded down."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm1 = LayerNorm2d(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(channels_last(x)))


class BatchNormStem(nn.Sequential):
    """Two 3x3 convolutions of stride 2, each with batch norm and ReLU: (B, in_chans, H, W) -> (B, dim, H/4, W/4).

    Args:
        in_chans: channels of the images.
        hidden_dim: channels between the convolutions.
        dim: channels of the map that comes out, its sizes rounded up.
        bias: give the convolutions a bias.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, bias: bool):
        steps = ((in_chans, hidden_dim), (hidden_dim, dim))
        super().__init__(*[ConvNormAct(before, after, 3, stride=2, bias=bias) for before, after in steps])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_last(x))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2: map (B, C, H, W) -> (B, out_dim, H/2, W/2), sizes rounded up."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = LayerNorm2d(out_dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PatchMerging(nn.Module):
    """2x2 neighbours concatenated, normalised, projected: map (B, C, H, W) -> (B, out_dim, H/2, W/2), sizes rounded up.

    Odd maps are zero-padded at the bottom and right before the norm.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        # Weights expect the neighbours in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 5, 3, 1).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)
