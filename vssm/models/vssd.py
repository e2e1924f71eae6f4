"""VSSD: Vision Mamba with Non-Causal State Space Duality (arXiv 2407.18559).

Code of the paper: https://github.com/YuHengsss/VSSD, no licence stated; none stated for its weights, linked below,
either. Nothing here is taken from it.

Quirk that is kept: the rate of stochastic depth of the smallest model is 0.2, which is what its training used, though
its configuration also holds 0.1. Not kept: the classifier there takes sides divisible by 32 only, its dense-prediction
backbone any; here every size works, with maps rounded up as in that backbone.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from timm.layers import Attention, ConvNormAct, DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers.conv import DepthwiseConv
from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_linear
from ..layers.nc_ssd2d import NCSSD2D
from ..layers.pyramid import EPS, channels_last
from .building import build, imagenet_cfg
from .pyramid import Pyramid, Stage, pyramid_info


class Stem(nn.Module):
    """Images (B, in_chans, H, W) -> (B, dim, H/4, W/4), sizes rounded up: two halvings with a residual pair between."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        half = dim // 2
        self.conv1 = ConvNormAct(in_chans, half, 3, stride=2)
        self.conv2 = ConvNormAct(half, half, 3)
        self.conv3 = ConvNormAct(half, half, 3, apply_act=False)
        self.conv4 = ConvNormAct(half, 4 * dim, 3, stride=2)
        self.conv5 = ConvNormAct(4 * dim, dim, 1, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(channels_last(x))
        x = x + self.conv3(self.conv2(x))
        return self.conv5(self.conv4(x))


class Merging(nn.Module):
    """Inverted bottleneck of stride 2: map (B, C, H, W) -> (B, out_dim, H/2, W/2), sizes rounded up."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        hidden = 4 * out_dim
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, groups=hidden)
        self.conv3 = ConvNormAct(hidden, out_dim, 1, bias=True, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class MapAttention(Attention):
    """Softmax attention among all positions of a map (B, H, W, C), without positional bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).view(x.shape)


class Block(nn.Module):
    """Residual mixer, then residual MLP, each pre-normalised and after a residual depthwise convolution.

    The convolutions tell the positions apart, which the mixers do not. Map (B, H, W, C) -> same shape.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.cpe1 = DepthwiseConv(dim)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mixer = mixer
        self.cpe2 = DepthwiseConv(dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VSSD(Pyramid):
    """VSSD backbone and classifier; images of any size from 32 x 32 up, not resized.

    The blocks of the last stage mix by softmax attention, all others by NC-SSD.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: timm's pooling name; "" leaves it out.
        depths: blocks per stage.
        dims: channels per stage.
        num_heads: heads per stage, of the scan and of the attention.
        d_state: states of the scan.
        mlp_ratio: hidden channels of the MLP per channel.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 4, 8, 4),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        d_state: int = 64,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(depths) == len(dims) == len(num_heads):
            got = f"{tuple(depths)}, {tuple(dims)} and {tuple(num_heads)}"
            raise ValueError(f"depths, dims and num_heads need one entry per stage each, got {got}")
        if dims[-1] % num_heads[-1]:
            raise ValueError(
                f"the last of dims must be a multiple of its num_heads, got {dims[-1]} and {num_heads[-1]}"
            )
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = Stem(in_chans, dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            blocks = []
            for rate in rates[i]:
                last = i == len(dims) - 1
                mixer = MapAttention(dim, heads) if last else NCSSD2D(dim, heads, d_state)
                blocks.append(Block(dim, mixer, mlp_ratio, rate))
            stages.append(Stage(Merging(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = pyramid_info(dims)
        self.num_features = dims[-1]
        self.norm = LayerNorm2d(dims[-1], eps=EPS)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay)."""
        return remap(state_dict, OFFICIAL_NAMES)


OFFICIAL_NAMES = [
    (r"^patch_embed\.conv1\.", "stem.conv1."),
    *[(rf"^patch_embed\.conv{i}\.{j}\.", f"stem.conv{2 * i - 2 + j}.") for i in (2, 3) for j in (0, 1)],
    (r"^(stem\.conv\d)\.norm\.", r"\1.bn."),
    *[(rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)],
    (r"\.downsample\.conv\.0\.conv\.", ".downsample.conv1."),
    (r"\.downsample\.conv\.1\.conv\.", ".downsample.conv2."),
    (r"\.downsample\.conv\.2\.conv\.", ".downsample.conv3.conv."),
    (r"\.downsample\.conv\.2\.norm\.", ".downsample.conv3.bn."),
    (r"^layers\.", "stages."),
    (r"\.attn\.conv2d\.", ".mixer.conv."),
    (r"\.attn\.to_qkv\.", ".mixer.qkv."),
    (r"\.attn\.to_out\.", ".mixer.proj."),
    (r"\.attn\.", ".mixer."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def _cfg(file: str) -> dict:
    return imagenet_cfg(
        "https://huggingface.co/YuhengSSS/VSSD/resolve/main/" + file,
        first_conv="stem.conv1.conv",
        license="none stated",
        paper_ids="arXiv:2407.18559",
        paper_name="VSSD: Vision Mamba with Non-Causal State Space Duality",
        origin_url="https://github.com/YuHengsss/VSSD",
    )


default_cfgs = generate_default_cfgs(
    {
        "vssd_micro.in1k": _cfg("vssd_micro_best.pth"),
        "vssd_tiny.in1k": _cfg("vssd_tiny_best_ema.pth"),
        "vssd_tiny.mesa_in1k": _cfg("vssd_tiny_e300_with_mesa.pth"),
        "vssd_small.in1k": _cfg("vssd_small_best_ema.pth"),
        "vssd_small.mesa_in1k": _cfg("vssd_small_e300_with_mesa.pth"),
        "vssd_base.in1k": _cfg("vssd_base_best_ema.pth"),
        "vssd_base.mesa_in1k": _cfg("vssd_base_e300_with_mesa.pth"),
    }
)

_DEEP = (3, 4, 21, 5)


@register_model
def vssd_micro(pretrained: bool = False, **kwargs) -> nn.Module:
    """VSSD-Micro."""
    args = {"depths": (2, 2, 8, 4), "dims": (48, 96, 192, 384), "d_state": 48, "drop_path_rate": 0.2}
    return build(VSSD, "vssd_micro", pretrained, **{**args, **kwargs})


@register_model
def vssd_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """VSSD-Tiny."""
    return build(VSSD, "vssd_tiny", pretrained, **{"drop_path_rate": 0.2, **kwargs})


@register_model
def vssd_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """VSSD-Small."""
    return build(VSSD, "vssd_small", pretrained, **{"depths": _DEEP, "drop_path_rate": 0.4, **kwargs})


@register_model
def vssd_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """VSSD-Base."""
    args = {"depths": _DEEP, "dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.6}
    return build(VSSD, "vssd_base", pretrained, **{**args, **kwargs})
