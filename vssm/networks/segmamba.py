"""SegMamba (arXiv 2401.13560): a UNETR-like network whose encoder walks volumes along three routes with Mamba.

Paper: "SegMamba: Long-range Sequential Modeling Mamba for 3D Medical Image Segmentation", Xing et al., 2024.
Code: github.com/ge-xing/SegMamba (no licence stated), whose weights load with `vssm.checkpoint.load_official`.

Letters: B batch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch.nn.functional as F
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from monai.networks.layers import Conv, Norm
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers.multi_mamba import MultiMamba, stack_official
from ..layers.routes import TriOrientedRoutes
from ..layers.unet import check_image, check_positive, check_size

__all__ = ["SegMamba"]


class GatedSpatialConvolution(nn.Module):
    """SegMamba's GSC module (section 2.2): a 3x3 branch and a 1x1 branch, added, mixed and added to the input."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.conv1 = conv(channels, channels, 3, padding=1)
        self.conv2 = conv(channels, channels, 3, padding=1)
        self.conv3 = conv(channels, channels, 1)
        self.conv4 = conv(channels, channels, 1)
        self.norm = Norm[Norm.INSTANCE, spatial_dims](channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self._unit(self.conv2, self._unit(self.conv1, x))
        y = y + self._unit(self.conv3, x)
        return x + self._unit(self.conv4, y)

    def _unit(self, conv: nn.Module, x: Tensor) -> Tensor:
        # One norm serves every convolution: it has no weights and keeps no statistics.
        return F.relu_(self.norm(conv(x)))


class TriMambaBlock(nn.Module):
    """A map, channels last, plus the tri-oriented Mamba of its layer norm."""

    def __init__(self, channels: int, num_slices: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mixer = MultiMamba(channels, TriOrientedRoutes(num_slices))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Stage(nn.Module):
    """Halve the map, gated convolution, Mamba blocks; the skip is the norm of their result through an MLP."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        num_blocks: int,
        num_slices: int | None,
        first: bool,
    ) -> None:
        super().__init__()
        conv, norm = Conv[Conv.CONV, spatial_dims], Norm[Norm.INSTANCE, spatial_dims]
        if first:
            self.reduce = conv(in_channels, channels, 7, stride=2, padding=3)
        else:
            self.reduce = nn.Sequential(norm(in_channels), conv(in_channels, channels, 2, stride=2))
        self.gsc = GatedSpatialConvolution(spatial_dims, channels)
        self.blocks = nn.ModuleList(TriMambaBlock(channels, num_slices) for _ in range(num_blocks))
        self.norm = norm(channels)
        self.mlp = nn.Sequential(conv(channels, 2 * channels, 1), nn.GELU(), conv(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The map that the next stage takes."""
        x = self.gsc(self.reduce(x)).movedim(1, -1).contiguous()
        for block in self.blocks:
            x = block(x)
        # Channels first in memory too, where instance norm is several times faster on a CPU.
        return x.movedim(-1, 1).contiguous()

    def skip(self, x: Tensor) -> Tensor:
        """What the decoder gets of the map that `forward` returned."""
        return self.mlp(self.norm(x))


class UpBlock(UnetrUpBlock):
    """MONAI's UnetrUpBlock without the concatenation of the enlarged map and the skip, the largest tensor by far.

    A convolution over joined channels is the sum of the convolutions over the parts.
    """

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes the last of `skips` off the list, so that nothing holds it once it has been used."""
        block = self.conv_block
        parts = [self.transp_conv(x), skips.pop()]
        shortcut = block.norm3(_convolve_parts(block.conv3.conv, parts))
        x = _convolve_parts(block.conv1.conv, parts)
        del parts
        x = block.lrelu(block.norm1(x))
        x = block.norm2(block.conv2(x))
        x += shortcut
        return block.lrelu(x)


def _convolve_parts(conv: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """`conv`, which has stride 1 and no bias, over the parts as if their channels were joined."""
    convolve = F.conv2d if conv.weight.ndim == 4 else F.conv3d
    weights = conv.weight.split([part.shape[1] for part in parts], dim=1)
    outputs = (convolve(part, weight, padding=conv.padding) for part, weight in zip(parts, weights, strict=True))
    total = next(outputs)
    for output in outputs:
        total += output
    return total


class SegMamba(nn.Module):
    """SegMamba in 3-D and, with the same parts, in 2-D. The defaults are the published network.

    Every stage halves the map: with four, image sizes must be multiples of 16. The third route of a stage's Mamba
    blocks goes across slices; there are as many as the stage's map has along its first axis (in 2-D its rows). The
    official code has 64, 32, 16 and 8 of them whatever the size of the volume, which agrees for 128 slices.

    Args:
        in_channels: channels of the image.
        out_channels: classes, background included.
        depths: Mamba blocks of each stage.
        features: channels of each stage, one entry per stage, the highest resolution first.
        hidden_size: channels at the bottleneck.
        num_slices: slices of each stage whatever the size of the image, one entry per stage; (64, 32, 16, 8) is what
            official weights were trained with. None: those of the map.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: arguments that do not fit each other; in forward an image of the wrong rank, channels or size.

    Example:
        >>> network = SegMamba(4, 3, depths=(1, 1), features=(8, 16), hidden_size=32)
        >>> network(torch.zeros(1, 4, 16, 24, 8)).shape
        torch.Size([1, 3, 16, 24, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        features: Sequence[int] = (48, 96, 192, 384),
        hidden_size: int = 768,
        num_slices: Sequence[int] | None = None,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; it must be 2 or 3")
        given = {"features": features, "depths": depths} | ({} if num_slices is None else {"num_slices": num_slices})
        for key, values in given.items():
            if len(values) != len(features):
                raise ValueError(f"{key} has {len(values)} entries; {len(features)} are needed, as features has")
            if not values:
                raise ValueError(f"{key} is empty; at least one stage is needed")
            check_positive(key, values)
        for key, value in dict(in_channels=in_channels, out_channels=out_channels, hidden_size=hidden_size).items():
            check_positive(key, (value,))
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.num_slices = None if num_slices is None else tuple(num_slices)

        slices = self.num_slices or [None] * len(features)
        stages = zip([in_channels, *features[:-1]], features, depths, slices, strict=True)
        self.stages = nn.ModuleList(Stage(spatial_dims, *sizes, first=s == 0) for s, sizes in enumerate(stages))
        # Encoder and decoder blocks go from the resolution of the image to the deepest; the shape of their norm and
        # activation is MONAI's default.
        levels = [*features, hidden_size]
        block = dict(spatial_dims=spatial_dims, kernel_size=3, norm_name="instance", res_block=True)
        self.encoders = nn.ModuleList(
            UnetrBasicBlock(in_channels=below, out_channels=level, stride=1, **block)
            for below, level in zip([in_channels, *features], levels, strict=True)
        )
        self.decoders = nn.ModuleList(
            UpBlock(in_channels=deeper, out_channels=level, upsample_kernel_size=2, **block)
            for level, deeper in pairwise(levels)
        )
        self.refine = UnetrBasicBlock(in_channels=features[0], out_channels=features[0], stride=1, **block)
        self.head = Conv[Conv.CONV, spatial_dims](features[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, out_channels, *size) of an image (batch, in_channels, *size).

        Raises:
            ValueError: wrong rank, channels or size of `x`; the message names what fits.
        """
        self._check_input(x)
        image, skips = x, []
        for stage, encoder in zip(self.stages, self.encoders[1:], strict=True):
            x = stage(x)
            skips.append(encoder(stage.skip(x)))
        x = skips.pop()
        for decoder in reversed(self.decoders):
            if not skips:
                # The skip of the image's resolution, the largest map of all, is made where it is needed.
                skips.append(self.encoders[0](image))
            x = decoder(x, skips)
        return self.head(self.refine(x))

    def _check_input(self, x: Tensor) -> None:
        check_image("SegMamba", x, self.spatial_dims, self.in_channels)
        size = tuple(x.shape[2:])
        check_size("SegMamba", size, [2 ** len(self.stages)] * self.spatial_dims)
        if self.num_slices is not None and not self._fits_slices(size):
            length, step = size[0], 2 ** len(self.stages)
            while not self._fits_slices((length, *size[1:])):
                length += step
            raise ValueError(
                f"SegMamba: the maps of an image of size {size} cannot be cut into num_slices = {self.num_slices} "
                f"slices of equal length; pad to {(length, *size[1:])}, or leave num_slices out"
            )

    def _fits_slices(self, size: Sequence[int]) -> bool:
        voxels = [math.prod(n >> (s + 1) for n in size) for s in range(len(self.stages))]
        return all(count % slices == 0 for count, slices in zip(voxels, self.num_slices, strict=True))

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the official network under the names of this one; see `vssm.checkpoint.load_official`."""
        rules = [
            (r"^vit\.downsample_layers\.0\.0\.", "stages.0.reduce."),
            (r"^vit\.downsample_layers\.(\d+)\.", r"stages.\1.reduce."),
            (r"^vit\.stages\.(\d+)\.(\d+)\.mamba\.", r"stages.\1.blocks.\2.mixer."),
            (r"^vit\.stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"^vit\.gscs\.(\d+)\.proj\.", r"stages.\1.gsc.conv1."),
            (r"^vit\.gscs\.(\d+)\.proj(\d)\.", r"stages.\1.gsc.conv\2."),
            (r"^vit\.mlps\.(\d+)\.fc1\.", r"stages.\1.mlp.0."),
            (r"^vit\.mlps\.(\d+)\.fc2\.", r"stages.\1.mlp.2."),
            # Official encoders count from the image, and so do decoders after the last one, which has no skip.
            *((rf"^encoder{i + 1}\.", f"encoders.{i}.") for i in range(len(self.encoders))),
            *((rf"^decoder{i + 2}\.", f"decoders.{i}.") for i in range(len(self.decoders))),
            (r"^decoder1\.", "refine."),
            (r"^out\.conv\.conv\.", "head."),
        ]
        return stack_official(remap(state_dict, rules), ("", "_b", "_s"))
