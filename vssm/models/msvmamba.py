"""MSVMamba: Multi-Scale VMamba, Hierarchy in Hierarchy Visual State Space Model (arXiv 2405.14174), two generations.

Code of the paper: https://github.com/YuHengsss/MSVMamba, no licence stated, neither for the code nor for the weights.
Nothing here is taken from it. The first generation is the repository's main branch, the second, whose models are named
"v3", its branch v2.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..checkpoint import linear_from_pointwise, remap
from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_linear
from ..layers.multiscale import MS2D, MergeThenNorm, NormThenMerge
from ..layers.pyramid import EPS, ConvDownsample, ConvStem, PatchMerging, PatchStem
from . import vmamba
from .building import build, imagenet_cfg
from .pyramid import Pyramid, Stage, pyramid_info


class ConvFFN(nn.Module):
    """MLP with a residual depthwise convolution before its activation. Map (B, H, W, C) -> same shape."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.permute(0, 3, 1, 2))
        return self.fc2(F.gelu(x + self.conv(x))).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Residual mixer, then residual ConvFFN; both pre-normalised. Map (B, H, W, C) -> same shape."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = ConvFFN(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PostNormBlock(Block):
    """`Block` of the second generation: the ConvFFN is normalised after it, not before."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class MSVMamba(Pyramid):
    """MSVMamba backbone and classifier, first generation; images of any size from 32 x 32 up, not resized.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: timm's pooling name; "" leaves it out.
        depths: blocks per stage.
        dims: channels per stage.
        ssm_ratio: inner channels of the mixer per channel.
        gate: gate the mixer's output.
        mlp_ratio: hidden channels of the ConvFFN per channel.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
    """

    stem_layer = PatchStem
    downsample_layer = PatchMerging
    merge_layer = NormThenMerge
    block_layer = Block
    # Which scan has which half of the official parameters.
    official_scans = ("half_scan", "scan")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 2, 9, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        ssm_ratio: float = 2.0,
        gate: bool = True,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims need one entry per stage each, got {tuple(depths)} and {tuple(dims)}")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = self.stem_layer(in_chans, dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                mixer = MS2D(dim, self.merge_layer, expand=ssm_ratio, gate=gate)
                blocks.append(self.block_layer(dim, mixer, mlp_ratio, rate))
            stages.append(Stage(self.downsample_layer(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = pyramid_info(dims)
        self.num_features = dims[-1]
        self.norm = LayerNorm2d(dims[-1], eps=EPS)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay); the parameters of the two scans, stored as one, come apart."""
        converted = {}
        for key, value in remap(state_dict, OFFICIAL_NAMES).items():
            if ".both_scan." in key:
                for scan, half in zip(self.official_scans, value.chunk(2), strict=True):
                    converted[key.replace(".both_scan.", f".{scan}.")] = half
            else:
                converted[key] = value
        return linear_from_pointwise(self, converted)


class MSVMambaV3(MSVMamba):
    """MSVMamba of the second generation; arguments as `MSVMamba`."""

    stem_layer = ConvStem
    downsample_layer = ConvDownsample
    merge_layer = MergeThenNorm
    block_layer = PostNormBlock
    official_scans = ("scan", "half_scan")


OFFICIAL_NAMES = [
    (r"\.op\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)$", r".mixer.both_scan.\1"),
    (r"\.op\.out_norm\.", ".mixer.merge.norm."),
    (r"\.op\.conv2d_b1\.", ".mixer.half_conv."),
    (r"\.se\.fc\.0\.", ".se.fc1."),
    (r"\.se\.fc\.2\.", ".se.fc2."),
    (r"\.convFFN\.linear([12])\.", r".mlp.fc\1."),
    (r"\.convFFN\.dwc\.", ".mlp.conv."),
    *vmamba.OFFICIAL_NAMES,
]


def _cfg(url: str, **places: object) -> dict:
    return imagenet_cfg(
        url,
        license="none stated",
        paper_ids="arXiv:2405.14174",
        paper_name="Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model",
        origin_url="https://github.com/YuHengsss/MSVMamba",
        **places,
    )


# By the end of the address of the folder with the file and its training log.
_FOLDERS = {
    "nano": "1J41w3ApitQhp2O3wHmJoOs4U032uqebK",
    "micro": "1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk",
    "tiny": "1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU",
}
_FILES = "https://huggingface.co/YuhengSSS/MSVMamba/resolve/main/"

default_cfgs = generate_default_cfgs(
    {
        **{
            f"msvmamba_{size}.in1k": _cfg("", notes=(f"https://drive.google.com/drive/folders/{folder}",))
            for size, folder in _FOLDERS.items()
        },
        **{f"msvmambav3_{size}.in1k": _cfg(f"{_FILES}msvmambav3_{size}_224.pth") for size in ("tiny", "small", "base")},
    }
)


@register_model
def msvmamba_nano(pretrained: bool = False, **kwargs) -> nn.Module:
    """MSVMamba-N."""
    args = {"depths": (1, 2, 5, 2), "dims": (48, 96, 192, 384), "drop_path_rate": 0.2}
    return build(MSVMamba, "msvmamba_nano", pretrained, **{**args, **kwargs})


@register_model
def msvmamba_micro(pretrained: bool = False, **kwargs) -> nn.Module:
    """MSVMamba-M."""
    args = {"depths": (1, 2, 5, 2), "dims": (64, 128, 256, 512), "drop_path_rate": 0.2}
    return build(MSVMamba, "msvmamba_micro", pretrained, **{**args, **kwargs})


@register_model
def msvmamba_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """MSVMamba-T."""
    args = {"depths": (1, 2, 9, 2), "dims": (96, 192, 384, 768), "drop_path_rate": 0.2}
    return build(MSVMamba, "msvmamba_tiny", pretrained, **{**args, **kwargs})


_V3 = {"ssm_ratio": 1.0, "gate": False, "mlp_ratio": 4.0}


@register_model
def msvmambav3_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """MSVMamba-T of the second generation."""
    args = {**_V3, "depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768), "drop_path_rate": 0.2}
    return build(MSVMambaV3, "msvmambav3_tiny", pretrained, **{**args, **kwargs})


@register_model
def msvmambav3_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """MSVMamba-S of the second generation."""
    args = {**_V3, "depths": (2, 3, 20, 2), "dims": (96, 192, 384, 768), "drop_path_rate": 0.4}
    return build(MSVMambaV3, "msvmambav3_small", pretrained, **{**args, **kwargs})


@register_model
def msvmambav3_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """MSVMamba-B of the second generation, the only one of it with a gate."""
    args = {**_V3, "gate": True, "depths": (2, 4, 18, 2), "dims": (128, 256, 512, 1024), "drop_path_rate": 0.5}
    return build(MSVMambaV3, "msvmambav3_base", pretrained, **{**args, **kwargs})
