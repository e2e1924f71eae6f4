"""VCMamba: Bridging Convolutions with Multi-Directional Mamba for Efficient Visual Representation (arXiv 2509.04669).

Code of the paper: https://github.com/Wertyuui345/VCMamba; no licence is stated for it or for its weights, linked below.
Nothing here is taken from it.

Three stages of convolutions and a fourth that ends in Mamba layers, with two classifiers of which one learnt from a
teacher. What the official mixer does with dt, B and C is kept, see `vssm.layers.snake_mamba`.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import (
    ConvNormAct,
    DropPath,
    LayerNorm2d,
    lecun_normal_,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.efficientformer_v2 import ConvMlpWithNorm
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_linear
from ..layers.pyramid import EPS, BatchNormStem
from ..layers.snake_mamba import SnakeMamba
from .building import build, imagenet_cfg
from .distilled import DISTILLED_CLASSIFIERS, DistilledHeads
from .pyramid import Pyramid, Stage, pyramid_info


class ConvStage(Stage):
    """A `Stage` whose blocks take and give (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


class ConvBlock(nn.Module):
    """Residual MLP with a depthwise convolution in the middle, scaled by channel. Map (B, C, H, W) -> same shape."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.mlp = ConvMlpWithNorm(dim, int(dim * mlp_ratio), mid_conv=True)
        self.scale = nn.Parameter(torch.full((dim, 1, 1), 1e-5))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.scale * self.mlp(x))


class MambaBlock(nn.Module):
    """Residual mixer, then residual MLP, both pre-normalised. Map (B, C, H, W) -> same shape.

    Args:
        dim: channels C.
        mlp_ratio: hidden channels of the MLP per channel.
        drop_path: stochastic depth.
        position: what comes before both, in the first of these blocks.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, position: nn.Module):
        super().__init__()
        self.position = position
        self.norm1 = nn.BatchNorm2d(dim)
        self.mixer = SnakeMamba(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlpWithNorm(dim, int(dim * mlp_ratio), mid_conv=True)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


# torch.fx cannot follow comparisons of sizes; the layer is one node of a traced graph.
@register_notrace_module
class PositionMap(nn.Module):
    """Adds a learnt map, resampled (bicubic) for maps of another size than its own. (B, C, H, W) -> same shape."""

    def __init__(self, dim: int, size: tuple[int, int]):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, dim, *size))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + resampled(self.pos_embed, x.shape[2:])


def resampled(pos_embed: Tensor, size: Sequence[int]) -> Tensor:
    """`pos_embed` (1, C, H, W) itself if it has the size (H, W) already, else its bicubic interpolation to it."""
    if pos_embed.shape[2:] == torch.Size(size):
        return pos_embed
    precise = pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32))
    return F.interpolate(precise, size=tuple(size), mode="bicubic").to(pos_embed.dtype)


class VCMamba(DistilledHeads, Pyramid):
    """VCMamba backbone and its two classifiers; images of any size from 32 x 32 up, not resized.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of each classifier; 0 leaves both out.
        global_pool: timm's pooling name; "" leaves it out.
        img_size: height and width, or one number for both, that the positional map is made for, a 32nd of it rounded
            up; for images of other sizes it is resampled.
        depths: blocks per stage.
        dims: channels per stage.
        mambas: how many of the last stage's blocks, its last ones, are Mamba layers; at least one.
        mlp_ratio: hidden channels of the MLPs per channel.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (4, 4, 12, 8),
        dims: Sequence[int] = (32, 64, 144, 288),
        mambas: int = 4,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims need one entry per stage each, got {tuple(depths)} and {tuple(dims)}")
        if not 1 <= mambas <= depths[-1]:
            raise ValueError(f"mambas must be from 1 to {depths[-1]}, the depth of the last stage, got {mambas}")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = BatchNormStem(in_chans, dims[0] // 2, dims[0], bias=True)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            convs = rates[i] if i < len(dims) - 1 else rates[i][:-mambas]
            down = ConvNormAct(dims[i - 1], dim, 3, stride=2, bias=True, apply_act=False) if i else nn.Identity()
            stages.append(ConvStage(down, [ConvBlock(dim, mlp_ratio, rate) for rate in convs]))
        # Every stage after the first halves what the stem has quartered, rounding up.
        reduction = 4 * 2 ** (len(dims) - 1)
        position = PositionMap(dims[-1], tuple(-(-side // reduction) for side in to_2tuple(img_size)))
        for i, rate in enumerate(rates[-1][-mambas:]):
            stages[-1].blocks.append(MambaBlock(dims[-1], mlp_ratio, rate, nn.Identity() if i else position))
        self.stages = nn.Sequential(*stages)
        self.feature_info = pyramid_info(dims)
        self.num_features = dims[-1]
        self.norm = LayerNorm2d(dims[-1], eps=EPS)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)
        self._init_convolutions()

    def _init_convolutions(self) -> None:
        """Stem: variance 1 / fan-in; pointwise convolutions of the MLPs: like linear layers; biases of both 0."""
        for layer in self.stem:
            lecun_normal_(layer.conv.weight)
            nn.init.zeros_(layer.conv.bias)
        for module in self.modules():
            if isinstance(module, ConvMlpWithNorm):
                for conv in (module.fc1.conv, module.fc2.conv):
                    trunc_normal_(conv.weight, std=0.02)
                    nn.init.zeros_(conv.bias)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay); a positional map for images of another size is resampled to ours."""
        own = {key: value for key, value in self.state_dict().items() if key.endswith("pos_embed")}
        state_dict = remap(state_dict, [*[(r"^pos_embed$", key) for key in own], *OFFICIAL_NAMES])
        for key in own.keys() & state_dict.keys():
            if state_dict[key].shape[:2] == own[key].shape[:2]:
                state_dict[key] = resampled(state_dict[key], own[key].shape[2:])
        return state_dict


OFFICIAL_NAMES = [
    *[(rf"^patch_embed\.{3 * i}\.", f"stem.{i}.conv.") for i in range(2)],
    *[(rf"^patch_embed\.{3 * i + 1}\.", f"stem.{i}.bn.") for i in range(2)],
    *[(rf"^network\.{2 * i}\.", f"stages.{i}.blocks.") for i in range(4)],
    *[(rf"^network\.{2 * i - 1}\.proj\.", f"stages.{i}.downsample.conv.") for i in range(1, 4)],
    *[(rf"^network\.{2 * i - 1}\.norm\.", f"stages.{i}.downsample.bn.") for i in range(1, 4)],
    (r"\.layer_scale_2$", ".scale"),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.mamba\.", ".mixer."),
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.in_conv\.0\.", ".in_conv.conv."),
    (r"\.in_conv\.1\.", ".in_conv.bn."),
    (r"\.out_conv\.1\.", ".out_conv.conv."),
    (r"\.out_conv\.2\.", ".out_conv.bn."),
    (r"\.mlp\.(fc1|fc2|mid)\.(weight|bias)$", r".mlp.\1.conv.\2"),
    (r"\.mlp\.mid_norm\.", ".mlp.mid.bn."),
    (r"\.mlp\.norm([12])\.", r".mlp.fc\1.bn."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^dist_head\.", "head_dist."),
]


def _cfg(file: str) -> dict:
    return imagenet_cfg(
        f"https://huggingface.co/SLDGroup/VCMamba/resolve/main/{file}",
        license="none stated",
        paper_ids="arXiv:2509.04669",
        paper_name="VCMamba: Bridging Convolutions with Multi-Directional Mamba for Efficient Visual Representation",
        origin_url="https://github.com/Wertyuui345/VCMamba",
        first_conv="stem.0.conv",
        classifier=DISTILLED_CLASSIFIERS,
    )


default_cfgs = generate_default_cfgs(
    {
        "vcmamba_small.in1k": _cfg("VCMamba-S.pth"),
        "vcmamba_medium.in1k": _cfg("VCMamba-M.pth"),
        "vcmamba_base.in1k": _cfg("VCMamba-B.pth"),
    }
)


@register_model
def vcmamba_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """VCMamba-S."""
    args = {"depths": (4, 4, 12, 8), "dims": (32, 64, 144, 288), "drop_path_rate": 0.2}
    return build(VCMamba, "vcmamba_small", pretrained, **{**args, **kwargs})


@register_model
def vcmamba_medium(pretrained: bool = False, **kwargs) -> nn.Module:
    """VCMamba-M."""
    args = {"depths": (4, 4, 12, 6), "dims": (48, 96, 224, 448), "drop_path_rate": 0.2}
    return build(VCMamba, "vcmamba_medium", pretrained, **{**args, **kwargs})


@register_model
def vcmamba_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """VCMamba-B."""
    args = {"depths": (4, 4, 12, 6), "dims": (64, 128, 320, 512), "drop_path_rate": 0.2}
    return build(VCMamba, "vcmamba_base", pretrained, **{**args, **kwargs})
