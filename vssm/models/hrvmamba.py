"""HRVMamba: Efficient High-Resolution Visual Representation Learning with State Space Model (arXiv 2410.03174).

Code of the paper: https://github.com/zhanghao5201/HRVMamba; no licence is stated for it or for its weights.
Nothing here is taken from it.

Four resolutions side by side as in HRNet, with DVSS blocks in the branches. Official choices that change numbers are
kept: the first positional encoding of a light block feeds the local convolutions only, not the residual; dropped paths
have the same rate in all branches of a unit; the linear layer of offsets starts like every other linear layer, so
offsets are not 0 at first. The DCNv4 module in the official repository does not fit its own model; parameter counts and
a compiled copy of the module left there agree on one without projections before and after, which is what this file has.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..checkpoint import linear_from_pointwise, remap
from ..layers import ss2d
from ..layers.drop_path import drop_path_rates
from ..layers.dvss import DSS2D, DVSSBlock
from ..layers.high_resolution import (
    HighResolutionNeck,
    HighResolutionStage,
    HighResolutionUnit,
    SingleStage,
)
from ..layers.initialise import init_conv_by_fan_out, init_linear
from ..layers.pyramid import BatchNormStem
from ..layers.routes import CrossRoutes
from .building import build, imagenet_cfg
from .pyramid import Pyramid, Stage, pyramid_info


class HRVMamba(Pyramid):
    """HRVMamba backbone and classifier; images of any size from 32 x 32 up, not resized.

    `feature_info`, `features_only` and `forward_intermediates` offer the four resolutions of the last stage, from 1/4
    to 1/32 of the image, which is what the authors' dense predictions and timm's HRNets use. (timm's HRNets give the
    stem at 1/2 as well and, unless told otherwise, widen the maps by the classifier's layers; neither is done here.)
    All of them take all stages, so stopping early leaves out the classifier's neck alone, and the final map is then the
    one of lowest resolution among the chosen. No norm follows these maps, so asking for it changes nothing.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: timm's pooling name; "" leaves it out.
        dims: channels of the branches, from the highest resolution to the lowest; divisible by 4.
        units: units, each ending in an exchange, of the stages with 2, 3, ... branches.
        depths: blocks per branch in every unit of these stages.
        stem_dim: channels of the stem.
        bottleneck_dim: channels after the first stage, which is ResNet's with one resolution.
        neck_dims: channels of the branches on their way to the classifier.
        num_features: channels before the classifier.
        smooth_offsets: a depthwise convolution before the offsets of the deformable layer.
        light: squeeze-and-excitation in the mixers and positional convolutions in the blocks (nano and tiny).
        mlp_ratio: hidden channels of the MLP per channel.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over the blocks of a branch.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (32, 64, 128, 256),
        units: Sequence[int] = (1, 4, 2),
        depths: Sequence[int] = (2, 2, 2),
        stem_dim: int = 64,
        bottleneck_dim: int = 256,
        neck_dims: Sequence[int] = (128, 256, 512, 1024),
        num_features: int = 2048,
        smooth_offsets: bool = False,
        light: bool = False,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(dims) == len(neck_dims) == len(units) + 1 == len(depths) + 1:
            raise ValueError(
                "dims and neck_dims need one entry per branch, units and depths one less, "
                f"got {tuple(dims)}, {tuple(neck_dims)}, {tuple(units)} and {tuple(depths)}"
            )
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = BatchNormStem(in_chans, stem_dim, stem_dim, bias=False)
        routes = CrossRoutes()

        def branch(dim: int, rates: Sequence[float]) -> Stage:
            mixers = [DSS2D(dim, routes, smooth_offsets, gate=light) for _ in rates]
            blocks = [DVSSBlock(dim, mixer, mlp_ratio, rate, light) for mixer, rate in zip(mixers, rates, strict=True)]
            return Stage(nn.Identity(), blocks)

        rates = iter(
            drop_path_rates(
                drop_path_rate, [depth for depth, count in zip(depths, units, strict=True) for _ in range(count)]
            )
        )
        stages = [SingleStage(stem_dim, bottleneck_dim, depth=2)]
        before = [bottleneck_dim]
        for branches, count in enumerate(units, start=2):
            own = list(dims[:branches])
            parts = [HighResolutionUnit([branch(dim, unit) for dim in own], own) for unit in islice(rates, count)]
            stages.append(HighResolutionStage(before, own, parts))
            before = own
        self.stages = nn.ModuleList(stages)
        last = f"stages.{len(units)}.units.{units[-1] - 1}.fusion"
        self.feature_info = [info | {"module": f"{last}.{i}"} for i, info in enumerate(pyramid_info(dims))]
        self.num_features = num_features
        self.neck = HighResolutionNeck(dims, neck_dims, num_features)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)
        for layers in (self.neck.downsample, self.neck.final):
            layers.apply(init_conv_by_fan_out)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> map (B, num_features, H/32, W/32), sizes rounded up."""
        return self.neck(self._branches(x))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen resolutions do not need; returns their indices.

        All stages stay, since every resolution depends on all of them; neck and classifier go with `prune_head`, and
        then so do exchanges into resolutions below the chosen. `prune_norm` changes nothing: there is no final norm.
        """
        taken, last = feature_take_indices(self._num_levels(), indices)
        if prune_head:
            unit = self.stages[-1].units[-1]
            unit.fusion = unit.fusion[: last + 1]
            self.num_features = self.feature_info[last]["num_chs"]
            self.neck = LastMap()
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer groups, for layer-wise learning rates: stem, blocks of all branches (or stages), neck, head."""
        # 99999 is timm's sign for the group of the layers before.
        blocks = [
            (r"^stages\.(\d+)\.transition", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.units\.(\d+)\.branches\.\d+\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.units\.(\d+)\.fusion", (99999,)),
        ]
        stages = [(r"^stages\.(\d+)", None)] if coarse else blocks
        return {"stem": r"^stem", "blocks": [*stages, (r"^neck", (9999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block of every branch in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay)."""
        return linear_from_pointwise(self, remap(state_dict, OFFICIAL_NAMES))

    def _num_levels(self) -> int:
        return len(self.stages[-1].units[-1].fusion)

    def _levels(self, x: Tensor, last: int, norm: bool) -> tuple[Tensor, list[Tensor]]:
        maps = self._branches(x)
        return (self.neck(maps) if last == len(maps) - 1 else maps[last]), maps

    def _branches(self, x: Tensor) -> list[Tensor]:
        """Images -> maps of all resolutions."""
        maps = [self._embed(x)]
        for stage in self.stages:
            maps = stage(maps)
        return maps


class LastMap(nn.Module):
    """In place of a neck that was removed: the map of lowest resolution."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[-1]


# A path of an exchange is one layer where it goes up, and up to three pairs of layers where it goes down.
_FUSE = r"\.fuse_layers\.(\d+)\.(\d+)"
OFFICIAL_NAMES = [
    *[(rf"^{kind}{i + 1}\.", f"stem.{i}.{kind}.") for kind in ("conv", "bn") for i in range(2)],
    (r"^layer1\.", "stages.0.blocks."),
    (r"^transition(\d)\.(\d+)\.(?:0\.)?0\.weight$", r"stages.\1.transition.\2.conv.weight"),
    (r"^transition(\d)\.(\d+)\.(?:0\.)?1\.(\w+)$", r"stages.\1.transition.\2.bn.\3"),
    *[(rf"^stage{i + 1}\.", f"stages.{i}.units.") for i in range(1, 4)],
    (rf"{_FUSE}\.0\.weight$", r".fusion.\1.paths.\2.conv.weight"),
    (rf"{_FUSE}\.1\.(\w+)$", r".fusion.\1.paths.\2.bn.\3"),
    *[(rf"{_FUSE}\.(\d+)\.{2 * i}\.", rf".fusion.\1.paths.\2.\3.{i}.conv.") for i in range(2)],
    *[(rf"{_FUSE}\.(\d+)\.{2 * i + 1}\.", rf".fusion.\1.paths.\2.\3.{i}.bn.") for i in range(2)],
    (r"(\.branches\.\d+)\.(\d+)\.", r"\1.blocks.\2."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.conv2d\.(\d+)\.", r"\1.local.convs.\2."),
    (r"(\.blocks\.\d+)\.op\.", r"\1.mixer."),
    (r"\.conv2d\.(offset_mask|offset_mask_dw)\.", r".deform.\1."),
    (r"\.se\.fc\.0\.", ".gate.fc1."),
    (r"\.se\.fc\.2\.", ".gate.fc2."),
    *ss2d.OFFICIAL_NAMES,
    (r"^neck\.increase_layers\.(\d+)\.0\.", r"neck.increase.\1."),
    (r"^neck\.downsample_layers\.", "neck.downsample."),
    (r"^neck\.final_layer\.", "neck.final."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def _cfg(drive: str, size: int) -> dict:
    return imagenet_cfg(
        "",
        notes=(f"https://drive.google.com/file/d/{drive}/view",),
        license="none stated",
        paper_ids="arXiv:2410.03174",
        paper_name="HRVMamba: High-Resolution Visual State Space Model for Dense Prediction",
        origin_url="https://github.com/zhanghao5201/HRVMamba",
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=1.0,
        first_conv="stem.0.conv",
    )


default_cfgs = generate_default_cfgs(
    {
        "hrvmamba_nano.in1k": _cfg("1vjoEmX8NGh3D4aIB2zTP6eKN23zXmd7i", 256),
        "hrvmamba_tiny.in1k": _cfg("18MnK9b-Ip7RLevdAzzPBFNIe_BNHg2Ry", 256),
        "hrvmamba_small.in1k": _cfg("1Gxo0Pxg2D7x3dU0P2AZ2YGEFS-7XMxIX", 256),
        "hrvmamba_base.in1k": _cfg("1jbXjvCBdjgraeEaJrDjD2wStpxJtCEuy", 224),
    }
)

# The levels are no sequence of layers, so of timm's extractors only those that look modules up by name can serve.
_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}


@register_model
def hrvmamba_nano(pretrained: bool = False, **kwargs) -> nn.Module:
    """HRVMamba-Nano, for images of 256 x 256."""
    args = {"dims": (8, 16, 32, 64), "bottleneck_dim": 64, "light": True, "drop_path_rate": 0.1}
    return build(HRVMamba, "hrvmamba_nano", pretrained, _FEATURES, **{**args, **kwargs})


@register_model
def hrvmamba_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """HRVMamba-Tiny, for images of 256 x 256."""
    args = {"dims": (16, 32, 64, 128), "bottleneck_dim": 128, "light": True, "drop_path_rate": 0.1}
    return build(HRVMamba, "hrvmamba_tiny", pretrained, _FEATURES, **{**args, **kwargs})


@register_model
def hrvmamba_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """HRVMamba-Small, for images of 256 x 256."""
    args = {"dims": (32, 64, 128, 256), "drop_path_rate": 0.2}
    return build(HRVMamba, "hrvmamba_small", pretrained, _FEATURES, **{**args, **kwargs})


@register_model
def hrvmamba_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """HRVMamba-Base, for images of 224 x 224."""
    args = {"dims": (80, 160, 320, 640), "smooth_offsets": True, "drop_path_rate": 0.2}
    return build(HRVMamba, "hrvmamba_base", pretrained, _FEATURES, **{**args, **kwargs})
