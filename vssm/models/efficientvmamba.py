"""EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba (arXiv 2403.09977).

Code of the paper: https://github.com/TerryPei/EfficientVMamba, Apache-2.0 licence; none is stated for its weights.
Nothing here is taken from it. Sizes are those of the released training logs, which the repository's configurations
contradict.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from timm.layers import ConvNormAct, DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_linear
from ..layers.pyramid import EPS, PatchMerging, PatchStem
from ..layers.routes import AtrousRoutes
from ..layers.ss2d import SS2D
from . import vmamba
from .building import build, imagenet_cfg
from .pyramid import Pyramid, Stage, pyramid_info

# Stages that scan; the later ones only convolve.
SCAN_STAGES = 2
# Hidden channels of both kinds of squeeze and excitation, per channel.
SQUEEZE = 0.125


class NormGate(nn.Module):
    """Squeeze and excitation whose squeeze sees the normalised map: map (B, H, W, C) times a weight per channel."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(dim * SQUEEZE)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.norm(x).mean((1, 2), keepdim=True)
        return x * self.fc2(F.gelu(self.fc1(squeezed))).sigmoid()


class ScanBlock(nn.Module):
    """Atrous SS2D and a convolution side by side, gated by one and the same `se`. Map (B, H, W, C) -> same shape."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mixer = SS2D(dim, AtrousRoutes(), d_state=16, gate=True, conv_bias=True)
        depthwise = ConvNormAct(dim, dim, 3, groups=dim, bias=True, act_layer=nn.GELU)
        self.conv = nn.Sequential(depthwise, nn.Conv2d(dim, dim, 1))
        self.se = NormGate(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        convolved = self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.se(self.mixer(y)) + self.se(convolved))


class ConvBlock(InvertedResidual):
    """timm's inverted residual with squeeze and excitation, on maps (B, H, W, C)."""

    def __init__(self, dim: int, drop_path: float):
        se = partial(SqueezeExcite, rd_ratio=SQUEEZE)
        super().__init__(dim, dim, exp_ratio=4.0, act_layer=nn.ReLU, se_layer=se, drop_path_rate=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EfficientVMamba(Pyramid):
    """EfficientVMamba backbone and classifier; images of any size from 32 x 32 up, not resized.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: timm's pooling name; "" leaves it out.
        depths: blocks per stage; those of the first two stages scan.
        dims: channels per stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (48, 96, 192, 384),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims need one entry per stage each, got {tuple(depths)} and {tuple(dims)}")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = PatchStem(in_chans, dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            block = ScanBlock if i < SCAN_STAGES else ConvBlock
            downsample = PatchMerging(dims[i - 1], dim) if i else nn.Identity()
            stages.append(Stage(downsample, [block(dim, rate) for rate in rates[i]]))
        self.stages = nn.Sequential(*stages)
        self.feature_info = pyramid_info(dims)
        self.num_features = dims[-1]
        self.norm = LayerNorm2d(dims[-1], eps=EPS)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay)."""
        return remap(state_dict, OFFICIAL_NAMES)


# The official stages 2 and 3 are plain sequences: a permutation, the blocks, another permutation, the downsampling.
# No release has more than nine blocks in a stage.
OFFICIAL_NAMES = [
    *[(rf"^layers\.([23])\.{j + 1}\.(conv|se)", rf"stages.\1.blocks.{j}.\2") for j in range(9)],
    (r"^layers\.2\.\d+\.(norm|reduction)\.", r"stages.3.downsample.\1."),
    (r"\.conv_(pw|dw)\.0\.", r".conv_\1."),
    (r"\.conv_pw\.1\.", ".bn1."),
    (r"\.conv_dw\.1\.", ".bn2."),
    (r"\.conv_pw2\.0\.", ".conv_pwl."),
    (r"\.conv_pw2\.1\.", ".bn3."),
    (r"\.conv_branch\.0\.", ".conv.0.conv."),
    (r"\.conv_branch\.1\.", ".conv.0.bn."),
    (r"\.conv_branch\.3\.", ".conv.1."),
    (r"\.se\.global_reduce\.", ".se.fc1."),
    (r"\.se\.channel_select\.", ".se.fc2."),
    *vmamba.OFFICIAL_NAMES,
]


def _cfg(size: str) -> dict:
    return imagenet_cfg(
        "",
        license="none stated",
        paper_ids="arXiv:2403.09977",
        paper_name="EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        origin_url="https://github.com/TerryPei/EfficientVMamba",
        notes=(f"https://huggingface.co/TerryPei/EfficientVMamba-{size}/tree/main",),
    )


default_cfgs = generate_default_cfgs(
    {
        "efficientvmamba_tiny.in1k": _cfg("Tiny"),
        "efficientvmamba_small.in1k": _cfg("Small"),
        "efficientvmamba_base.in1k": _cfg("Base"),
    }
)


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """EfficientVMamba-T."""
    args = {"depths": (2, 2, 4, 2), "dims": (48, 96, 192, 384), "drop_path_rate": 0.1}
    return build(EfficientVMamba, "efficientvmamba_tiny", pretrained, **{**args, **kwargs})


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """EfficientVMamba-S."""
    args = {"depths": (2, 2, 4, 2), "dims": (64, 128, 256, 512), "drop_path_rate": 0.1}
    return build(EfficientVMamba, "efficientvmamba_small", pretrained, **{**args, **kwargs})


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """EfficientVMamba-B."""
    args = {"depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768), "drop_path_rate": 0.1}
    return build(EfficientVMamba, "efficientvmamba_base", pretrained, **{**args, **kwargs})
