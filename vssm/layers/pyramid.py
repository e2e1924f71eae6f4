"""Stems and downsampling of hierarchical backbones, all on maps (B, C, H, W), some on volumes too.

Letters: B batch, C channels, H height, W width. A volume has a depth before H.
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


class LayerNorm3d(nn.LayerNorm):
    """Layer norm over the channels of a volume (B, C, depth, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PatchStem(nn.Module):
    """Non-overlapping 4x4 patches: images (B, in_chans, H, W) -> (B, dim, H/4, W/4), sizes rounded down.

    With `spatial_dims=3` the same for volumes.
    """

    def __init__(self, in_chans: int, dim: int, spatial_dims: int = 2):
        super().__init__()
        conv, norm, self.memory_format = {
            2: (nn.Conv2d, LayerNorm2d, torch.channels_last),
            3: (nn.Conv3d, LayerNorm3d, torch.channels_last_3d),
        }[spatial_dims]
        self.conv1 = conv(in_chans, dim, 4, stride=4)
        self.norm1 = norm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x.contiguous(memory_format=self.memory_format)))


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

    Odd maps are zero-padded at the bottom and right before the norm. With `spatial_dims=3` the same for volumes, of
    which 2x2x2 neighbours are merged.
    """

    def __init__(self, dim: int, out_dim: int, spatial_dims: int = 2):
        super().__init__()
        self.spatial_dims = spatial_dims
        self.norm = nn.LayerNorm(2**spatial_dims * dim, eps=EPS)
        self.reduction = nn.Linear(2**spatial_dims * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        axes = range(2, 2 + self.spatial_dims)
        x = F.pad(x, [amount for axis in reversed(axes) for amount in (0, x.shape[axis] % 2)])
        for axis in reversed(axes):
            x = x.unflatten(axis, (-1, 2))
        # Weights expect the neighbours in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column), the first axis
        # being the fastest.
        halves = [2 * axis - 1 for axis in axes]
        x = x.permute(0, *(half - 1 for half in halves), *reversed(halves), 1).flatten(1 + self.spatial_dims)
        return self.reduction(self.norm(x)).movedim(-1, 1)
