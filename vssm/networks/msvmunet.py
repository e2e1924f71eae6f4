"""MSVM-UNet (arXiv 2408.13735): VMamba's encoder, multi-scale blocks and large-kernel patch expanding; 2-D.

Paper: "MSVM-UNet: Multi-Scale Vision Mamba UNet for Medical Image Segmentation", Chen et al., 2024.
Code: github.com/gndlwch2w/msvm-unet (no licence stated), whose weights load with `vssm.checkpoint.load_official`.
Nothing here is taken from it.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import linear_from_pointwise, load_strictly, remap
from ..layers.drop_path import drop_path_rates
from ..layers.patch_expand import channels_to_neighbours
from ..layers.pyramid import EPS
from ..layers.routes import CrossRoutes
from ..layers.ss2d import SS2D
from ..layers.unet import check_divisible, check_image, check_positive
from ..models import VMamba, vmamba
from .pretrained import encoder_state, grey_to_rgb, stem_for_grey

__all__ = ["MSVMUNet"]


class MultiScaleMlp(nn.Module):
    """MLP with depthwise convolutions of several sizes, and the identity, summed on the hidden map.

    Map (B, H, W, C) -> map of the same shape.
    """

    def __init__(self, dim: int, hidden: int, kernel_sizes: Sequence[int] = (1, 3, 5)) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.convs = nn.ModuleList(
            nn.Conv2d(hidden, hidden, size, padding=size // 2, groups=hidden, bias=False) for size in kernel_sizes
        )
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x)).movedim(-1, 1)
        x = x + sum(conv(x) for conv in self.convs)
        return self.fc2(x.movedim(1, -1))


class LargeKernelPatchExpand(nn.Module):
    """Pointwise and depthwise 3x3 convolution, channels to neighbours, layer norm (the paper's LKPE).

    Map (B, H, W, dim) -> (B, scale H, scale W, out_dim).
    """

    def __init__(self, dim: int, out_dim: int, scale: int) -> None:
        super().__init__()
        hidden = scale**2 * out_dim
        self.scale = scale
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = nn.LayerNorm(out_dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.bn(self.conv1(x.movedim(-1, 1)))))
        return self.norm(channels_to_neighbours(x.movedim(1, -1), self.scale))


class UpStage(nn.Module):
    """Enlarge, join with the skip, multi-scale blocks; (B, H, W, C) and skip (B, 2H, 2W, dim) -> the skip's shape."""

    def __init__(self, in_dim: int, dim: int, rates: Sequence[float]) -> None:
        super().__init__()
        routes = CrossRoutes()
        self.upsample = LargeKernelPatchExpand(in_dim, dim, 2)
        self.join = nn.Linear(2 * dim, dim)
        self.blocks = nn.Sequential(
            *(vmamba.Block(dim, SS2D(dim, routes, expand=1.0), 4.0, rate, mlp_layer=MultiScaleMlp) for rate in rates)
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(self.join(torch.cat((self.upsample(x), skip), dim=-1)))


class MSVMUNet(nn.Module):
    """MSVM-UNet, in 2-D: 35.9 million parameters with the published settings, which are the defaults.

    The encoder is the `VMamba` backbone of `vmamba_tiny` without its classifier.

    Args:
        spatial_dims: 2; the encoder is a backbone for images.
        in_channels: channels of the image.
        out_channels: classes, background included.
        depths: blocks of each encoder stage; the authors' small encoder has (2, 2, 20, 2).
        decoder_depths: blocks of each decoder stage, the deepest first; one entry fewer than `depths`.
        features: channels of each stage, from the highest resolution (a quarter of the image's) to the deepest.
        drop_path_rate: stochastic depth of the last encoder block; grows linearly from 0. The authors' small encoder
            has 0.3.
        decoder_drop_path_rate: stochastic depth of the deepest decoder block; shrinks linearly to 0 up the decoder.
        encoder_weights: file or state dict of `vmamba_tiny` (s1l8), official or vssm's own, for the encoder to start
            from; its classifier is not used.

    Raises:
        ValueError: arguments that do not fit each other; `encoder_weights` that do not fit the encoder, with the first
            ten mismatches; in forward an image of the wrong rank, channels or size.

    Example:
        >>> MSVMUNet(2, 3, 9).eval()(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 9, 64, 96])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        decoder_depths: Sequence[int] = (2, 2, 2),
        features: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.2,
        decoder_drop_path_rate: float = 0.2,
        encoder_weights: str | os.PathLike | Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise ValueError(f"spatial_dims is {spatial_dims}; MSVMUNet's encoder is for images, so it must be 2")
        if len(decoder_depths) != len(depths) - 1:
            raise ValueError(
                f"decoder_depths has {len(decoder_depths)} entries; {len(depths) - 1} are needed, since depths has "
                f"{len(depths)}"
            )
        named = {"depths": depths, "decoder_depths": decoder_depths, "features": features}
        named |= {"in_channels": [in_channels], "out_channels": [out_channels]}
        for key, values in named.items():
            check_positive(key, values)
        self.in_channels = in_channels
        self.size_divisor = 4 * 2 ** (len(features) - 1)

        self.encoder = VMamba(
            in_channels, depths=depths, dims=features, ssm_ratio=1.0, drop_path_rate=drop_path_rate, num_classes=0
        )
        # Norm and pooling are the classifier's.
        self.encoder.prune_intermediate_layers(len(features), prune_norm=True)
        mirrored = drop_path_rates(decoder_drop_path_rate, decoder_depths[::-1])
        self.decoder = nn.ModuleList()
        for i in reversed(range(len(features) - 1)):
            self.decoder.append(UpStage(features[i + 1], features[i], mirrored[i][::-1]))
        self.upsample = LargeKernelPatchExpand(features[0], features[0], 4)
        self.classifier = nn.Conv2d(features[0], out_channels, 1)
        if encoder_weights is not None:
            load_strictly(self.encoder, encoder_state(self.encoder, encoder_weights, in_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of an image.

        Args:
            x: (B, in_channels, H, W), both sides divisible by `size_divisor`. A network of three channels also takes
                images of one, which it repeats.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: wrong rank, channels or size of `x`; the message names what fits.
        """
        x = grey_to_rgb(x, self.in_channels)
        check_image(type(self).__name__, x, 2, self.in_channels)
        check_divisible(type(self).__name__, x.shape[2:], self.size_divisor)
        if self.training and x[:, 0].numel() == self.size_divisor**2:
            raise ValueError(
                "MSVMUNet: batch norm needs more than one position at the deepest stage in training, got "
                f"{tuple(x.shape)}; give more images or larger ones, or call eval()"
            )
        skips = self.encoder.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        x = skips.pop()
        for stage in self.decoder:
            x = stage(x, skips.pop())
        return self.classifier(self.upsample(x).movedim(-1, 1))

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay); see `vssm.checkpoint.load_official`.

        For `in_channels=1` the official stem of three channels is summed: the official network repeats such images.
        """
        state = linear_from_pointwise(self, remap(state_dict, OFFICIAL_NAMES))
        return stem_for_grey(state, "encoder.stem.conv1.weight", self.in_channels)


OFFICIAL_NAMES = [
    (r"^_model\.", ""),
    (r"^encoder\.layer0\.0\.", "encoder.stem.conv1."),
    (r"^encoder\.layer0\.2\.", "encoder.stem.norm1."),
    (r"^encoder\.layer1\.0\.", "encoder.stem.conv2."),
    (r"^encoder\.layer1\.2\.", "encoder.stem.norm2."),
    *((rf"^encoder\.downsamples\.{i}\.", f"encoder.stages.{i + 1}.downsample.") for i in range(3)),
    (r"^encoder\.layers\.", "encoder.stages."),
    (r"^decoder\.layers\.(\d+)\.up\.", r"decoder.\1.upsample."),
    (r"^decoder\.layers\.(\d+)\.concat_layer\.", r"decoder.\1.join."),
    (r"^decoder\.layers\.(\d+)\.vss_layer\.", r"decoder.\1."),
    (r"^decoder\.out_layers\.0\.out\.", "classifier."),
    (r"^decoder\.out_layers\.0\.", "upsample."),
    (r"upsample\.expand\.0\.", "upsample.conv1."),
    (r"upsample\.expand\.1\.", "upsample.bn."),
    (r"upsample\.expand\.3\.", "upsample.conv2."),
    (r"\.multiscale_conv\.dw_convs\.", ".convs."),
    *vmamba.OFFICIAL_NAMES,
]
