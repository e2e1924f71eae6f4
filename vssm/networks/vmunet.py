"""VM-UNet (arXiv 2402.02491): a U-Net of VMamba's blocks; in 2-D as published, in 3-D with scans along three axes.

Paper: "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", Ruan, Li and Xiang, 2024.
Code: github.com/JCruan519/VM-UNet (Apache-2.0), whose weights load with `vssm.checkpoint.load_official`; the encoder
also starts from VMamba's first version. Nothing here is taken from it. The official network applies the sigmoid itself
where it has one class; here logits come out.

Letters: B batch, C channels, H height, W width. A volume has a depth before H.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from monai.networks.layers import Conv
from torch import Tensor, nn

from ..checkpoint import Rule, load_strictly, remap
from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_linear
from ..layers.patch_expand import PatchExpand
from ..layers.pyramid import PatchMerging, PatchStem
from ..layers.routes import CrossRoutes
from ..layers.ss2d import SS2D
from ..layers.unet import check_divisible, check_image, check_positive
from ..models import vmamba
from .pretrained import encoder_state, grey_to_rgb, stem_for_grey

__all__ = ["VMUNet", "VSSUNet"]

PATCH = 4


def _blocks(dim: int, make_mixer: Callable[[int], nn.Module], rates: Sequence[float]) -> nn.Sequential:
    """Blocks of VMamba's first version, which has no MLP."""
    return nn.Sequential(*(vmamba.Block(dim, make_mixer(dim), 0.0, rate) for rate in rates))


class VSSEncoder(nn.Module):
    """4x4 patches, then stages of blocks with patch merging in between; the names are those of `vssm.models.VMamba`."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        rates: Sequence[Sequence[float]],
        make_mixer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.stem = PatchStem(in_channels, features[0], spatial_dims)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(features):
            downsample = PatchMerging(features[i - 1], dim, spatial_dims) if i else nn.Identity()
            blocks = _blocks(dim, make_mixer, rates[i])
            self.stages.append(nn.Sequential(OrderedDict(downsample=downsample, blocks=blocks)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image (B, in_channels, H, W) -> map of the last stage, and what each stage's blocks got; channels last."""
        x = self.stem(x)
        inputs = []
        for stage in self.stages:
            x = stage.downsample(x).movedim(1, -1)
            inputs.append(x)
            x = stage.blocks(x).movedim(-1, 1)
        return x.movedim(1, -1), inputs


class VSSUNet(nn.Module):
    """The U-Net of VM-UNet around any token mixer; see `VMUNet` for the arguments.

    Args:
        make_mixer: gives the token mixer of a block for its channels; the mixer keeps the shape of a map (B, H, W, C).
    """

    mixer_names: Sequence[Rule] = ()

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        depths: Sequence[int],
        decoder_depths: Sequence[int],
        features: Sequence[int],
        drop_path_rate: float,
        make_mixer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        stages = len(features)
        if len(depths) != stages or len(decoder_depths) != stages:
            raise ValueError(
                "depths, decoder_depths and features need one entry per stage each, "
                f"got {tuple(depths)}, {tuple(decoder_depths)} and {tuple(features)}"
            )
        named = {"depths": depths, "decoder_depths": decoder_depths, "features": features}
        named |= {"in_channels": [in_channels], "out_channels": [out_channels]}
        for key, values in named.items():
            check_positive(key, values)
        if features[0] % PATCH:
            raise ValueError(
                f"the first of features must be divisible by {PATCH}, the channels before the classifier being a "
                f"quarter of it, got {features[0]}"
            )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.size_divisor = PATCH * 2 ** (stages - 1)

        rates = drop_path_rates(drop_path_rate, depths)
        self.encoder = VSSEncoder(spatial_dims, in_channels, features, rates, make_mixer)
        # From the deepest stage to the highest resolution; the deepest block is dropped most.
        mirrored = drop_path_rates(drop_path_rate, decoder_depths[::-1])
        self.decoder = nn.ModuleList()
        for i in reversed(range(stages)):
            upsample = PatchExpand(features[i + 1], features[i], 2, spatial_dims) if i < stages - 1 else nn.Identity()
            blocks = _blocks(features[i], make_mixer, mirrored[i][::-1])
            self.decoder.append(nn.Sequential(OrderedDict(upsample=upsample, blocks=blocks)))
        self.upsample = PatchExpand(features[0], features[0] // PATCH, PATCH, spatial_dims)
        self.classifier = Conv[Conv.CONV, spatial_dims](features[0] // PATCH, out_channels, 1)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of an image.

        Args:
            x: (B, in_channels, H, W), in 3-D (B, in_channels, depth, H, W); all sides divisible by `size_divisor`.
                A network of three channels also takes images of one, which it repeats.

        Returns:
            (B, out_channels, *size).

        Raises:
            ValueError: wrong rank, channels or size of `x`; the message names what fits.
        """
        x = grey_to_rgb(x, self.in_channels)
        check_image(type(self).__name__, x, self.spatial_dims, self.in_channels)
        check_divisible(type(self).__name__, x.shape[2:], self.size_divisor)
        x, skips = self.encoder(x)
        # The skips are what the encoder's blocks got; the deepest is added after the deepest decoder stage, and the
        # highest resolution has none.
        for stage in self.decoder[:-1]:
            x = stage(x) + skips.pop()
        x = self.upsample(self.decoder[-1](x))
        return self.classifier(x.movedim(-1, 1))

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay); see `vssm.checkpoint.load_official`.

        For `in_channels=1` the official stem of three channels is summed: the official network repeats such images.
        """
        rules = [
            # Left behind by the profiler that the authors' trainer runs before it saves.
            (r"(^|\.)total_(ops|params)$", None),
            (r"^vmunet\.", ""),
            *self.mixer_names,
            *vmamba.OFFICIAL_NAMES,
            (r"^(stem|stages)\.", r"encoder.\1."),
            (r"^layers_up\.", "decoder."),
            (r"^final_up\.", "upsample."),
            (r"^final_conv\.", "classifier."),
        ]
        return stem_for_grey(remap(state_dict, rules), "encoder.stem.conv1.weight", self.in_channels)


class VMUNet(VSSUNet):
    """VM-UNet, of 27.4 million parameters with the published settings, which are the defaults.

    Args:
        spatial_dims: 2, or 3: volumes, walked along six routes, each axis the fastest once, there and back.
        in_channels: channels of the image.
        out_channels: classes; 1 for a binary task, whose logit needs a sigmoid.
        depths: blocks of each encoder stage.
        decoder_depths: blocks of each decoder stage, the deepest first.
        features: channels of each stage, from the highest resolution (a quarter of the image's) to the deepest.
        d_state: states per channel of the scan.
        drop_path_rate: stochastic depth of the deepest blocks; from 0 it grows linearly down the encoder, and
            likewise shrinks up the decoder.
        encoder_weights: file or state dict of VMamba's first version ("v0", `vmambav0_*`) to start from. Its blocks go
            into the encoder and, as the authors do it, also into the decoder stage of the same resolution; of stages
            deeper than here the first blocks are used. Patch expanding and classifier have no such weights.

    Raises:
        ValueError: arguments that do not fit each other; `encoder_weights` that do not fit the network, with the first
            ten mismatches; in forward an image of the wrong rank, channels or size.

    Example:
        >>> VMUNet(2, 3, 9)(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 9, 64, 96])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        features: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
        encoder_weights: str | os.PathLike | Mapping[str, Tensor] | None = None,
    ) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; it must be 2 or 3")
        routes = CrossRoutes(spatial_dims)

        def make_mixer(dim: int) -> SS2D:
            return SS2D(dim, routes, d_state=d_state, gate=True, conv_bias=True, spatial_dims=spatial_dims)

        super().__init__(
            spatial_dims, in_channels, out_channels, depths, decoder_depths, features, drop_path_rate, make_mixer
        )
        if encoder_weights is not None:
            self._load_vmamba(encoder_weights)

    def _load_vmamba(self, weights: str | os.PathLike | Mapping[str, Tensor]) -> None:
        last = len(self.decoder) - 1
        own = {}
        for key, value in encoder_state(self.encoder, weights, self.in_channels).items():
            match = re.fullmatch(r"stages\.(\d+)\.blocks\.((\d+)\..+)", key)
            stage = int(match[1]) if match else None
            if stage is None or stage > last:
                own[f"encoder.{key}"] = value
                continue
            if int(match[3]) < len(self.encoder.stages[stage].blocks):
                own[f"encoder.{key}"] = value
            if int(match[3]) < len(self.decoder[last - stage].blocks):
                own[f"decoder.{last - stage}.blocks.{match[2]}"] = value
        absent = ("upsample", "classifier", *(f"decoder.{i}.upsample" for i in range(last + 1)))
        load_strictly(self, own, absent)
