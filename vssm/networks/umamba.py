"""U-Mamba (arXiv 2401.04722): a residual U-Net whose encoder features pass through Mamba layers, in 2-D and 3-D.

Paper: "U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation", Ma, Li and Wang, 2024.
Code: github.com/bowang-lab/U-Mamba (Apache-2.0), whose weights load with `vssm.checkpoint.load_official`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from monai.networks.layers import Conv
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers.mamba import Mamba
from ..layers.ssd import Mamba2, NonCausalSSD
from ..layers.unet import LEAKY_SLOPE, UNetShape, UpStage, check_image, check_positive, per_axis, residual_blocks

__all__ = ["UMambaBot", "UMambaEnc"]

# Token mixers to choose from, with Mamba's number of states so that they compare; None leaves the layer out.
_STATES = 16
_MIXERS = {"mamba": Mamba, "ssd": Mamba2, "nc_ssd": NonCausalSSD, "none": None}


class MambaLayer(nn.Module):
    """Layer norm and a mixer over the tokens of a feature map; the result REPLACES the features (no residual).

    Tokens are the voxels in row-major order, described by their channels; or, where `map_size` is given, the channels,
    described by the voxels of a map of that size. float32 throughout, also under autocast: in half precision the
    rounding errors of stacked Mamba layers grow, and U-Mamba's authors met NaN in training.
    """

    def __init__(self, mixer: type[nn.Module], channels: int, map_size: Sequence[int] | None = None) -> None:
        super().__init__()
        self.channel_tokens = map_size is not None
        width = math.prod(map_size) if self.channel_tokens else channels
        self.norm = nn.LayerNorm(width)
        self.mixer = mixer(width, d_state=_STATES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(self.norm.weight.dtype).flatten(2)
            if self.channel_tokens:
                tokens = self.mixer(self.norm(tokens))
            else:
                tokens = self.mixer(self.norm(tokens.transpose(1, 2))).transpose(1, 2)
            return tokens.reshape(x.shape)


# What plans of nnU-Net 2.1, from which U-Mamba was made, call the arguments in "architecture" of later ones; residual
# encoders have blocks for convolutions.
_EARLY_WORDS = {
    "kernel_sizes": "conv_kernel_sizes",
    "strides": "pool_op_kernel_sizes",
    "n_conv_per_stage": "n_conv_per_stage_encoder",
    "n_blocks_per_stage": "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder": "n_conv_per_stage_decoder",
}


def _in_early_words(plans: Mapping) -> Mapping:
    """One configuration of the plans of any nnU-Net, as nnU-Net 2.1 would have written it."""
    if "architecture" not in plans:
        return plans
    arguments = plans["architecture"]["arch_kwargs"]
    early = {_EARLY_WORDS[key]: value for key, value in arguments.items() if key in _EARLY_WORDS}
    if features := arguments.get("features_per_stage"):
        base, largest = features[0], max(features)
        if list(features) != [min(base * 2**s, largest) for s in range(len(features))]:
            raise ValueError(f"features_per_stage is {list(features)}; U-Mamba's double up to the largest")
        early |= {"UNet_base_num_features": base, "unet_max_num_features": largest}
    return {key: value for key, value in plans.items() if key != "architecture"} | early


class _UMamba(nn.Module):
    """The U-Net both variants share. `token_maps[s]`: the map size where stage s has channel tokens, else None."""

    _plan_keys = (
        "conv_kernel_sizes",
        "pool_op_kernel_sizes",
        "n_conv_per_stage_encoder",
        "n_conv_per_stage_decoder",
        "UNet_base_num_features",
        "unet_max_num_features",
    )

    def __init__(
        self,
        shape: UNetShape,
        in_channels: int,
        out_channels: int,
        deep_supervision: bool,
        mixer: str,
        mixer_stages: Sequence[int],
        token_maps: Sequence[Sequence[int] | None],
    ) -> None:
        super().__init__()
        check_positive("in_channels", (in_channels,))
        check_positive("out_channels", (out_channels,))
        if mixer not in _MIXERS:
            raise ValueError(f"mixer is {mixer!r}; it must be one of {', '.join(_MIXERS)}")
        if not mixer_stages or not set(mixer_stages) <= set(range(shape.depth)):
            raise ValueError(
                f"mixer_stages is {tuple(mixer_stages)}; it must name some of the stages 0 to {shape.depth - 1} "
                "(mixer='none' leaves the mixers out)"
            )
        self.shape = shape
        self.in_channels = in_channels
        self.deep_supervision = deep_supervision

        dims, features, kernels, strides = shape.spatial_dims, shape.features, shape.kernel_sizes, shape.strides
        self.stem = residual_blocks(dims, in_channels, features[0], kernels[0], 1, shape.num_blocks[0])
        self.stages = nn.ModuleList()
        for s, num_blocks in enumerate(shape.num_blocks):
            blocks = residual_blocks(dims, features[max(s - 1, 0)], features[s], kernels[s], strides[s], num_blocks)
            mixes = s in mixer_stages and mixer != "none"
            mamba = MambaLayer(_MIXERS[mixer], features[s], token_maps[s]) if mixes else nn.Identity()
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks, mamba=mamba)))
        self.decoder = nn.ModuleList()
        for s, num_blocks in zip(reversed(range(shape.depth - 1)), shape.num_decoder_blocks, strict=True):
            # The official 2-D networks leave out the skip of the highest resolution; the 3-D ones do not.
            concatenate = dims == 3 or s > 0
            self.decoder.append(
                UpStage(dims, features[s + 1], features[s], kernels[s], strides[s + 1], num_blocks, concatenate)
            )
        # Counted from the highest resolution, like the list that forward returns.
        heads = features[:-1] if deep_supervision else features[:1]
        self.heads = nn.ModuleList(Conv[Conv.CONV, dims](channels, out_channels, 1) for channels in heads)

        # Kaiming for the U-Net; the Mamba layers (Linear, Conv1d) keep their own initialisation.
        for module in self.modules():
            if isinstance(module, Conv[Conv.CONV, dims]):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
                nn.init.zeros_(module.bias)

    @classmethod
    def from_plans(
        cls,
        plans: Mapping,
        in_channels: int,
        out_channels: int,
        *,
        deep_supervision: bool = False,
        mixer: str = "mamba",
        mixer_stages: Sequence[int] | None = None,
    ) -> _UMamba:
        """The published network for one configuration of nnU-Net's plans, e.g. `plans["configurations"]["3d_fullres"]`.

        Raises:
            ValueError: `plans` lacks a key that is needed, or its features do not double from stage to stage.
        """
        plans = _in_early_words(plans)
        missing = [key for key in cls._plan_keys if key not in plans]
        if missing:
            raise ValueError(f"plans lacks {', '.join(missing)}; one configuration of nnU-Net's plans is needed")
        kernel_sizes = plans["conv_kernel_sizes"]
        options = dict(deep_supervision=deep_supervision, mixer=mixer, mixer_stages=mixer_stages)
        return cls(len(kernel_sizes[0]), in_channels, out_channels, **cls._plan_arguments(plans), **options)

    @classmethod
    def _plan_arguments(cls, plans: Mapping) -> dict:
        depth = len(plans["conv_kernel_sizes"])
        base, largest = plans["UNet_base_num_features"], plans["unet_max_num_features"]
        # The official networks keep the planned number of blocks for the first half of the encoder's stages and of the
        # decoder's, and build one block in each of the others.
        half = math.ceil(depth / 2)
        return dict(
            features=[min(base * 2**s, largest) for s in range(depth)],
            strides=plans["pool_op_kernel_sizes"],
            kernel_sizes=plans["conv_kernel_sizes"],
            num_blocks=[n if s < half else 1 for s, n in enumerate(plans["n_conv_per_stage_encoder"])],
            num_decoder_blocks=[n if s < half else 1 for s, n in enumerate(plans["n_conv_per_stage_decoder"])],
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image (batch, in_channels, *size).

        Returns:
            (batch, out_channels, *size); with `deep_supervision`, in training and in evaluation, a list of logits: one
            entry for every stage but the deepest, the highest resolution first.

        Raises:
            ValueError: wrong rank, channels or size of `x`; the message names what fits.
        """
        check_image(type(self).__name__, x, self.shape.spatial_dims, self.in_channels)
        self._check_size(tuple(x.shape[2:]))
        x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        skips.pop()
        logits = []
        for stage in self.decoder:
            x = stage(x, skips.pop())
            if self.deep_supervision or not skips:
                logits.insert(0, self.heads[len(skips)](x))
        return logits if self.deep_supervision else logits[0]

    def _check_size(self, size: tuple[int, ...]) -> None:
        self.shape.check_size(type(self).__name__, size)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the official network under the names of this one; see `vssm.checkpoint.load_official`.

        Official files repeat tensors (the encoder inside the decoder, every block under `all_modules`) and always hold
        the heads of all resolutions; a network without deep supervision takes only the head of the highest.
        """
        depth = self.shape.depth
        rules = [
            (r"^decoder\.encoder\.", "encoder."),
            (r"\.conv([12])\.(conv|all_modules\.0)\.", r".conv\1."),
            (r"\.conv([12])\.(norm|all_modules\.1)\.", r".norm\1."),
            (r"\.conv3\.", ".shortcut."),
            (r"^encoder\.stem\.", "stem."),
            (r"^encoder\.stages\.(\d+)\.", r"stages.\1.blocks."),
            (r"^encoder\.mamba_layers\.(\d+)\.", r"stages.\1.mamba."),
            (r"^mamba_layer\.", f"stages.{depth - 1}.mamba."),
            (r"\.mamba\.mamba\.", ".mamba.mixer."),
            (r"^decoder\.stages\.(\d+)\.", r"decoder.\1.blocks."),
            (r"^decoder\.upsample_layers\.(\d+)\.conv\.", r"decoder.\1.reduce."),
            # Official heads count from the deepest stage.
            *((rf"^decoder\.seg_layers\.{depth - 2 - i}\.", f"heads.{i}.") for i in range(depth - 1)),
        ]
        if len(self.heads) == 1:
            rules.append((r"^heads\.[1-9]", None))
        return remap(state_dict, rules)


class UMambaBot(_UMamba):
    """U-Mamba with one Mamba layer, at the bottleneck.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included.
        features: channels of each stage, from the highest resolution to the deepest; at least two stages.
        strides: reduction of each stage, a number or one per axis. The first is normally 1: the logits are smaller than
            the image by it.
        kernel_sizes: of each stage's convolutions, a number or one per axis, odd.
        num_blocks: residual blocks of each stage; the stem before the first stage has as many as that.
        num_decoder_blocks: residual blocks of each decoder stage, the deepest first; one entry fewer than `features`.
        deep_supervision: return logits at every resolution, in training and in evaluation. Set the attribute of the
            same name to False, for instance after training, to get the highest resolution only.
        mixer: what mixes the tokens: "mamba" is the published choice; "ssd" is Mamba-2 and "nc_ssd" VSSD's non-causal
            mixer in its place, with as many states; "none" is the control, the same network without these layers.
        mixer_stages: stages followed by a mixer; None is the published choice, the deepest.

    Raises:
        ValueError: arguments that do not fit each other; in forward an image of the wrong rank, channels or size.

    Example:
        >>> network = UMambaBot(3, 1, 4, features=(8, 16, 32), strides=(1, 2, 2), kernel_sizes=(3, 3, 3),
        ...                     num_blocks=(2, 2, 1), num_decoder_blocks=(2, 2))
        >>> network(torch.zeros(1, 1, 16, 16, 32)).shape
        torch.Size([1, 4, 16, 16, 32])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[int],
        strides: Sequence[Sequence[int] | int],
        kernel_sizes: Sequence[Sequence[int] | int],
        num_blocks: Sequence[int],
        num_decoder_blocks: Sequence[int],
        deep_supervision: bool = False,
        mixer: str = "mamba",
        mixer_stages: Sequence[int] | None = None,
    ) -> None:
        shape = UNetShape(spatial_dims, features, strides, kernel_sizes, num_blocks, num_decoder_blocks)
        if mixer_stages is None:
            mixer_stages = (shape.depth - 1,)
        super().__init__(shape, in_channels, out_channels, deep_supervision, mixer, mixer_stages, [None] * shape.depth)


class UMambaEnc(_UMamba):
    """U-Mamba with Mamba layers throughout the encoder; their outputs are the skips.

    Where the map of `img_size` has no more voxels than the stage has channels, the channels are the tokens. The shapes
    of the weights then depend on `img_size`, and the network takes images of that size only.

    Args:
        img_size: size of the patches to train on, in voxels, a number or one per axis.
        mixer_stages: stages followed by a mixer; None is the published choice: in 3-D every stage, in 2-D every second
            one, so that the deepest has one.

    The other arguments, the errors and `from_plans` are those of `UMambaBot`.
    """

    _plan_keys = (*_UMamba._plan_keys, "patch_size")

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        img_size: Sequence[int] | int,
        features: Sequence[int],
        strides: Sequence[Sequence[int] | int],
        kernel_sizes: Sequence[Sequence[int] | int],
        num_blocks: Sequence[int],
        num_decoder_blocks: Sequence[int],
        deep_supervision: bool = False,
        mixer: str = "mamba",
        mixer_stages: Sequence[int] | None = None,
    ) -> None:
        shape = UNetShape(spatial_dims, features, strides, kernel_sizes, num_blocks, num_decoder_blocks)
        if mixer_stages is None:
            mixer_stages = range(shape.depth) if spatial_dims == 3 else range((shape.depth + 1) % 2, shape.depth, 2)
        img_size = per_axis("img_size", img_size, spatial_dims)
        shape.check_size(type(self).__name__, img_size)
        maps = shape.map_sizes(img_size)
        token_maps = [size if math.prod(size) <= f else None for size, f in zip(maps, features, strict=True)]
        super().__init__(shape, in_channels, out_channels, deep_supervision, mixer, mixer_stages, token_maps)
        self.img_size = img_size
        layers = enumerate(stage.mamba for stage in self.stages)
        self.channel_token_stages = tuple(s for s, layer in layers if getattr(layer, "channel_tokens", False))

    @classmethod
    def _plan_arguments(cls, plans: Mapping) -> dict:
        return super()._plan_arguments(plans) | {"img_size": plans["patch_size"]}

    def _check_size(self, size: tuple[int, ...]) -> None:
        if self.channel_token_stages and size != self.img_size:
            raise ValueError(
                f"UMambaEnc was built for img_size {self.img_size}, got {size}: the tokens of its stages "
                f"{self.channel_token_stages} are channels, as long as the map has voxels, so its weights fit no other "
                f"size; cut the image into patches of {self.img_size}, or build another network with img_size={size}"
            )
        super()._check_size(size)
