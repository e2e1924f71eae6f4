"""VMamba: Visual State Space Model (arXiv 2401.10166), and the paper's first version ("vanilla", v0).

Code of the paper: https://github.com/MzeroMiko/VMamba, MIT licence; its weights, linked below, come with the same.
Nothing here is taken from it.

The authors released several architectures of the same size, which they tell apart as sXlY: ssm_ratio X, Y blocks in the
third stage. A registered name is one architecture, and a tag only says which weights: the plain names are the releases
that the authors' README recommends (vmamba_tiny is s1l8, vmamba_small and vmamba_base are s2l15), every other release
has its sXlY in its name (vmamba_tiny_s2l5). A tag of another architecture is an error from timm, never another model.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Mapping, Sequence

from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..checkpoint import linear_from_pointwise, remap
from ..layers import ss2d
from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_linear
from ..layers.pyramid import EPS, ConvDownsample, ConvStem, PatchMerging, PatchStem
from ..layers.routes import CrossRoutes
from ..layers.ss2d import SS2D
from .building import build, imagenet_cfg
from .pyramid import Pyramid, Stage, pyramid_info


class Block(nn.Module):
    """Residual mixer, then residual MLP unless `mlp_ratio` is 0; both pre-normalised. Map (B, H, W, C) -> same shape.

    `mlp_layer` is called with (dim, hidden channels).
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        mlp_layer: Callable[[int, int], nn.Module] = Mlp,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=EPS) if mlp_ratio else None
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio)) if mlp_ratio else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class VMamba(Pyramid):
    """VMamba backbone and classifier; images of any size from 32 x 32 up, not resized.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: timm's pooling name; "" leaves it out.
        depths: blocks per stage.
        dims: channels per stage.
        stem_layer: class called with (in_chans, dims[0]); a quarter of the image size comes out.
        downsample_layer: class called with (channels before, channels after) between stages.
        d_state: states per channel of the scan.
        ssm_ratio: inner channels of the mixer per channel.
        gate: gate the mixer's output (v0).
        conv_bias: bias of the mixer's convolution (v0).
        mlp_ratio: hidden channels of the MLP per channel; 0 leaves the MLP out (v0).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        stem_layer: type[nn.Module] = ConvStem,
        downsample_layer: type[nn.Module] = ConvDownsample,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        gate: bool = False,
        conv_bias: bool = False,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims need one entry per stage each, got {tuple(depths)} and {tuple(dims)}")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = stem_layer(in_chans, dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        routes = CrossRoutes()
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                mixer = SS2D(dim, routes, d_state=d_state, expand=ssm_ratio, gate=gate, conv_bias=conv_bias)
                blocks.append(Block(dim, mixer, mlp_ratio, rate))
            stages.append(Stage(downsample_layer(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = pyramid_info(dims)
        self.num_features = dims[-1]
        self.norm = LayerNorm2d(dims[-1], eps=EPS)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay); 1x1 convolutions become the linear layers they are."""
        return linear_from_pointwise(self, remap(state_dict, OFFICIAL_NAMES))


# `proj`, `norm`, `ln_1`, `self_attention` and the root's `norm` and `head` are v0's first names.
OFFICIAL_NAMES = [
    (r"^patch_embed\.(0|proj)\.", "stem.conv1."),
    (r"^patch_embed\.(2|norm)\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    *[(rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)],
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^layers\.", "stages."),
    (r"(\.blocks\.\d+)\.(norm|ln_1)\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.(op|self_attention)\.", r"\1.mixer."),
    *ss2d.OFFICIAL_NAMES,
    (r"^(classifier\.)?norm\.", "norm."),
    (r"^(classifier\.)?head\.(weight|bias)$", r"head.fc.\2"),
]

_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"


def _cfg(weights: str) -> dict:
    return imagenet_cfg(
        _RELEASES + weights,
        license="mit",
        paper_ids="arXiv:2401.10166",
        paper_name="VMamba: Visual State Space Model",
        origin_url="https://github.com/MzeroMiko/VMamba",
    )


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.s1l8_in1k": _cfg("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small.s2l15_in1k": _cfg("%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_base.s2l15_in1k": _cfg("%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_tiny_s2l5.in1k": _cfg("%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s1l20.in1k": _cfg("%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s1l20.in1k": _cfg("%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmambav0_tiny.in1k": _cfg("%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vmambav0_small.in1k": _cfg("%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vmambav0_base.in1k": _cfg("%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"),
    }
)

_SMALL = (96, 192, 384, 768)
_BASE = (128, 256, 512, 1024)
_V0 = {
    "stem_layer": PatchStem,
    "downsample_layer": PatchMerging,
    "d_state": 16,
    "gate": True,
    "conv_bias": True,
    "mlp_ratio": 0.0,
}


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """VMamba-T[s1l8]; the other released tiny model is `vmamba_tiny_s2l5`."""
    args = {"depths": (2, 2, 8, 2), "dims": _SMALL, "ssm_ratio": 1.0, "drop_path_rate": 0.2}
    return build(VMamba, "vmamba_tiny", pretrained, **{**args, **kwargs})


@register_model
def vmamba_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """VMamba-S[s2l15]; the other released small model is `vmamba_small_s1l20`."""
    args = {"depths": (2, 2, 15, 2), "dims": _SMALL, "drop_path_rate": 0.3}
    return build(VMamba, "vmamba_small", pretrained, **{**args, **kwargs})


@register_model
def vmamba_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """VMamba-B[s2l15]; the other released base model is `vmamba_base_s1l20`."""
    args = {"depths": (2, 2, 15, 2), "dims": _BASE, "drop_path_rate": 0.6}
    return build(VMamba, "vmamba_base", pretrained, **{**args, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs) -> nn.Module:
    """VMamba-T[s2l5]."""
    args = {"depths": (2, 2, 5, 2), "dims": _SMALL, "drop_path_rate": 0.2}
    return build(VMamba, "vmamba_tiny_s2l5", pretrained, **{**args, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs) -> nn.Module:
    """VMamba-S[s1l20]."""
    args = {"depths": (2, 2, 20, 2), "dims": _SMALL, "ssm_ratio": 1.0, "drop_path_rate": 0.3}
    return build(VMamba, "vmamba_small_s1l20", pretrained, **{**args, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs) -> nn.Module:
    """VMamba-B[s1l20]."""
    args = {"depths": (2, 2, 20, 2), "dims": _BASE, "ssm_ratio": 1.0, "drop_path_rate": 0.5}
    return build(VMamba, "vmamba_base_s1l20", pretrained, **{**args, **kwargs})


@register_model
def vmambav0_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vanilla VMamba-T."""
    args = {**_V0, "depths": (2, 2, 9, 2), "dims": _SMALL, "drop_path_rate": 0.2}
    return build(VMamba, "vmambav0_tiny", pretrained, **{**args, **kwargs})


@register_model
def vmambav0_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vanilla VMamba-S."""
    args = {**_V0, "depths": (2, 2, 27, 2), "dims": _SMALL, "drop_path_rate": 0.3}
    return build(VMamba, "vmambav0_small", pretrained, **{**args, **kwargs})


@register_model
def vmambav0_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """Vanilla VMamba-B."""
    args = {**_V0, "depths": (2, 2, 27, 2), "dims": _BASE, "drop_path_rate": 0.6}
    return build(VMamba, "vmambav0_base", pretrained, **{**args, **kwargs})
