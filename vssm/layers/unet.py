"""Parts of residual U-Nets in nnU-Net's manner, 2-D and 3-D, on MONAI's factories (for `vssm.networks` only)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index

import torch
from monai.networks.layers import Conv, get_act_layer, get_norm_layer, same_padding
from torch import Tensor, nn
from torch.nn.functional import interpolate

__all__ = ["LEAKY_SLOPE", "ResidualBlock", "UNetShape", "UpStage", "check_size", "residual_blocks"]

LEAKY_SLOPE = 0.01


@dataclass
class UNetShape:
    """The sizes of a U-Net, checked against each other; strides and kernel sizes become one tuple per stage.

    Args:
        spatial_dims: 2 or 3.
        features: channels of each stage, from the highest resolution to the deepest; at least two stages.
        strides: reduction of each stage, a number or one per axis.
        kernel_sizes: of each stage's convolutions, a number or one per axis, odd.
        num_blocks: blocks of each stage.
        num_decoder_blocks: blocks of each decoder stage, the deepest first; one entry fewer than `features`.

    Raises:
        ValueError: naming the argument that does not fit, what came and what is needed.
    """

    spatial_dims: int
    features: Sequence[int]
    strides: Sequence[Sequence[int] | int]
    kernel_sizes: Sequence[Sequence[int] | int]
    num_blocks: Sequence[int]
    num_decoder_blocks: Sequence[int]

    def __post_init__(self) -> None:
        if self.spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {self.spatial_dims}; it must be 2 or 3")
        if self.depth < 2:
            raise ValueError(f"features has {self.depth} entries; a U-Net needs at least two stages")
        needed = {"strides": self.depth, "kernel_sizes": self.depth, "num_blocks": self.depth}
        for key, count in (needed | {"num_decoder_blocks": self.depth - 1}).items():
            if len(getattr(self, key)) != count:
                raise ValueError(
                    f"{key} has {len(getattr(self, key))} entries; {count} are needed, since features has {self.depth}"
                )
        self.strides = [per_axis("strides", stride, self.spatial_dims) for stride in self.strides]
        self.kernel_sizes = [per_axis("kernel_sizes", size, self.spatial_dims) for size in self.kernel_sizes]
        for key in ("features", "num_blocks", "num_decoder_blocks"):
            check_positive(key, getattr(self, key))
        for key in ("strides", "kernel_sizes"):
            check_positive(key, sum(getattr(self, key), ()))
        if any(size % 2 == 0 for size in sum(self.kernel_sizes, ())):
            raise ValueError(f"kernel_sizes is {self.kernel_sizes}; every size must be odd, so that padding keeps maps")

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.features)

    @property
    def size_divisor(self) -> tuple[int, ...]:
        """What input sizes must be multiples of, per axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))

    def map_sizes(self, img_size: Sequence[int]) -> list[tuple[int, ...]]:
        """The size of the map after each stage."""
        sizes = []
        for stride in self.strides:
            img_size = tuple(n // step for n, step in zip(img_size, stride, strict=True))
            sizes.append(img_size)
        return sizes

    def check_size(self, network: str, size: Sequence[int]) -> None:
        """Raise ValueError, with the nearest size that fits, unless `network` can take images of `size`."""
        check_size(network, size, self.size_divisor)


def check_size(network: str, size: Sequence[int], divisor: Sequence[int]) -> None:
    """Raise ValueError, with the nearest size that fits, unless `network` can take images of `size`.

    Args:
        divisor: what sizes must be multiples of, per axis: the reduction of the deepest stage.
    """
    maps = [max(math.ceil(n / step), 1) for n, step in zip(size, divisor, strict=True)]
    if math.prod(maps) == 1:
        maps[-1] = 2
    fitting = tuple(n * step for n, step in zip(maps, divisor, strict=True))
    if tuple(size) != fitting:
        raise ValueError(
            f"{network} needs sizes divisible by {tuple(divisor)} that leave more than one voxel at the deepest stage "
            f"(instance norm divides by their spread), got {tuple(size)}; pad to {fitting}"
        )


def per_axis(key: str, value: Sequence[int] | int, spatial_dims: int) -> tuple[int, ...]:
    """One number per axis, from as many or from one for all; ValueError, naming `key`, for another count."""
    sizes = (value,) * spatial_dims if isinstance(value, Integral) else tuple(value)
    sizes = tuple(index(size) for size in sizes)
    if len(sizes) != spatial_dims:
        raise ValueError(f"{key} holds {sizes}; a number or {spatial_dims} of them are needed")
    return sizes


def check_image(network: str, x: Tensor, spatial_dims: int, in_channels: int) -> None:
    """Raise ValueError, naming `network`, unless x is a batch of images (batch, in_channels, *size)."""
    if x.ndim != spatial_dims + 2 or x.shape[1] != in_channels:
        raise ValueError(
            f"{network} needs an input (batch, channels, *size) with {in_channels} channels and "
            f"{spatial_dims} spatial axes, got {tuple(x.shape)}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"{network}: the batch is empty, shape {tuple(x.shape)}; give at least one image")


def check_divisible(network: str, size: Sequence[int], divisor: int) -> None:
    """Raise ValueError, naming `network` and the nearest sizes that fit, unless `divisor` divides every side."""
    if any(side % divisor or side == 0 for side in size):
        larger = tuple(max(math.ceil(side / divisor), 1) * divisor for side in size)
        smaller = tuple(max(side // divisor, 1) * divisor for side in size)
        crop = "" if any(s > side for s, side in zip(smaller, size, strict=True)) else f" or crop to {smaller}"
        raise ValueError(f"{network} needs sizes divisible by {divisor}, got {tuple(size)}; pad to {larger}{crop}")


def check_positive(key: str, values: Sequence[int]) -> None:
    """Raise ValueError, naming `key`, unless every number is at least 1."""
    if min(values) < 1:
        raise ValueError(f"{key} holds {min(values)}; every number must be at least 1")


class ResidualBlock(nn.Module):
    """(conv, instance norm, leaky ReLU), (conv, instance norm), plus the shortcut, leaky ReLU.

    With `project` the shortcut is a 1x1 convolution without a norm, which MONAI's UnetResBlock cannot express.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int] | int = 1,
        project: bool = False,
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        norm = ("instance", {"affine": True, "eps": 1e-5})
        padding = same_padding(kernel_size)
        self.conv1 = conv(in_channels, out_channels, kernel_size, stride, padding)
        self.norm1 = get_norm_layer(norm, spatial_dims, out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size, 1, padding)
        self.norm2 = get_norm_layer(norm, spatial_dims, out_channels)
        self.shortcut = conv(in_channels, out_channels, 1, stride) if project else nn.Identity()
        self.act = get_act_layer(("leakyrelu", {"negative_slope": LEAKY_SLOPE, "inplace": True}))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.act(y)


def residual_blocks(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] | int,
    num_blocks: int,
) -> nn.Sequential:
    """`num_blocks` ResidualBlocks; the first changes channels and resolution and always projects its shortcut."""
    first = ResidualBlock(spatial_dims, in_channels, out_channels, kernel_size, stride, project=True)
    others = (ResidualBlock(spatial_dims, out_channels, out_channels, kernel_size) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *others)


class UpStage(nn.Module):
    """Reduce the channels, enlarge by `scale`, concatenate (up, skip) if `concatenate`, then residual blocks."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        scale: Sequence[int],
        num_blocks: int,
        concatenate: bool = True,
    ) -> None:
        super().__init__()
        self.scale = tuple(float(factor) for factor in scale)
        self.concatenate = concatenate
        self.reduce = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 1)
        joined = 2 * out_channels if concatenate else out_channels
        self.blocks = residual_blocks(spatial_dims, joined, out_channels, kernel_size, 1, num_blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # A 1x1 convolution commutes with the copies of nearest-neighbour interpolation, so it runs on the small map.
        x = interpolate(self.reduce(x), scale_factor=self.scale, mode="nearest")
        return self.blocks(torch.cat((x, skip), dim=1) if self.concatenate else x)
