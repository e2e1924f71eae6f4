"""GroupMamba: Parameter-Efficient and Accurate Group Visual State Space Model (arXiv 2407.13772).

Code of the paper: https://github.com/Amshaker/GroupMamba, MIT licence; for its weights, linked below, no other is
stated. Nothing here is taken from it.

Quirks of the code that are kept, since the published weights depend on them: a mixer normalises its input and, with the
same weights, its result before the projection; the skip is a product with the input, not a sum; the class block sees
the class token alone, never the map. As in the training of the published weights, the scan's A and step biases are
subject to weight decay.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..checkpoint import remap
from ..layers import ss2d
from ..layers.conv import DepthwiseConv
from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_conv_by_fan_out, init_linear
from ..layers.pyramid import EPS, ConvDownsample, channels_last
from ..layers.routes import CrossRoutes, SelectedRoutes
from ..layers.ss2d import SS2D
from .building import build, imagenet_cfg
from .distilled import DISTILLED_CLASSIFIERS, DistilledHeads
from .pyramid import Pyramid, Stage, pyramid_info

# The norms of blocks, stages and the class token; those of stem, downsampling and mixers have EPS.
BLOCK_EPS = 1e-6


class Stem(nn.Module):
    """Images (B, in_chans, H, W) -> (B, dim, H/4, W/4), sizes rounded up: three convolutions on half the size."""

    def __init__(self, in_chans: int, dim: int, hidden_dim: int):
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, hidden_dim, 7, stride=2)
        self.conv2 = ConvNormAct(hidden_dim, hidden_dim, 3)
        self.conv3 = ConvNormAct(hidden_dim, hidden_dim, 3)
        self.proj = ConvDownsample(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv3(self.conv2(self.conv1(channels_last(x)))))


class NormedDownsample(ConvDownsample):
    """The norm that ends the stage before, then a 3x3 convolution of stride 2 and its norm; sizes rounded up.

    The norm stands here so that the stages give out their maps without one, the last stage having none.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__(dim, out_dim)
        self.norm0 = LayerNorm2d(dim, eps=BLOCK_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm0(x))


class GroupMixer(nn.Module):
    """Modulated group mamba layer: each quarter of the channels is scanned in one direction of the cross-scan.

    x = norm(u);  y = [SS2D of each quarter] * x * skip_scale * sigmoid(fc2(relu(fc1(mean(x)))));  out = proj(norm(y)).
    Map (B, H, W, C) -> same shape.

    Args:
        dim: channels C, divisible by 4.

    Raises:
        ValueError: `dim` is not divisible by 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dims must be divisible by 4, one group for each direction, got {dim}")
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.groups = nn.ModuleList(
            SS2D(dim // 4, SelectedRoutes(CrossRoutes(), (k,)), expand=1, gate=True, conv_bias=True) for k in range(4)
        )
        # At least one channel between, which matters to narrower models than the published ones only.
        self.fc1 = nn.Linear(dim, max(dim // 16, 1))
        self.fc2 = nn.Linear(max(dim // 16, 1), dim)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        affinity = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))))
        parts = x.chunk(4, -1)
        # By number, as torch.fx cannot follow a loop over parts.
        mixed = torch.cat([group(parts[k]) for k, group in enumerate(self.groups)], -1)
        return self.proj(self.norm(mixed * self.skip_scale * x * affinity))


class ConvMlp(nn.Module):
    """MLP with a depthwise 3x3 convolution before its activation. Map (B, H, W, C) -> same shape."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = DepthwiseConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.conv(self.fc1(x))))


class Block(nn.Module):
    """Residual mixer, which normalises its input itself, then residual pre-normalised MLP. Map (B, H, W, C) -> same."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.mixer = GroupMixer(dim)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """What becomes of pooled features, taken as a class token: a mixer normalised afterwards, an MLP, a norm.

    (B, n * dim) -> same shape, for poolings that give n vectors (timm's "catavgmax": 2), each on its own.
    """

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.mixer = GroupMixer(dim)
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm = nn.LayerNorm(dim, eps=BLOCK_EPS)

    def forward(self, x: Tensor) -> Tensor:
        # A token is a map of one position.
        token = x.reshape(-1, 1, 1, self.mixer.proj.in_features)
        token = token + self.norm1(self.mixer(token))
        token = token + self.mlp(self.norm2(token))
        return self.norm(token).view(x.shape)


class GroupMamba(DistilledHeads, Pyramid):
    """GroupMamba backbone and its two classifiers; images of any size from 32 x 32 up, not resized.

    `forward_features` and the intermediates are maps as the stages leave them, without a norm. The head pools the map
    ("avg" in the paper), and the result is the class token that `class_block` updates before the classifiers. With
    global_pool="" there is neither token nor block, and the map itself comes out.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of each classifier; 0 leaves both out.
        global_pool: timm's pooling name, for the class token; "" leaves it out.
        depths: blocks per stage.
        dims: channels per stage, divisible by 4.
        stem_dim: channels of the stem's convolutions on half the size of the image.
        mlp_ratios: hidden channels of the MLP per channel, per stage; the class block has the last.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 4, 9, 3),
        dims: Sequence[int] = (64, 128, 348, 448),
        stem_dim: int = 32,
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(depths) == len(dims) == len(mlp_ratios):
            got = f"{tuple(depths)}, {tuple(dims)} and {tuple(mlp_ratios)}"
            raise ValueError(f"depths, dims and mlp_ratios need one entry per stage each, got {got}")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.class_mlp_ratio = mlp_ratios[-1]
        self.stem = Stem(in_chans, dims[0], stem_dim)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [Block(dim, mlp_ratios[i], rate) for rate in rates[i]]
            stages.append(Stage(NormedDownsample(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = pyramid_info(dims)
        self.num_features = dims[-1]
        self.norm = nn.Identity()
        self.class_block = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_weights)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Two new classifiers; the class block stays while its width fits, and is there only with pooling."""
        super().reset_classifier(num_classes, global_pool)
        dim = self.num_features
        if self.head.global_pool.is_identity():
            self.class_block = nn.Identity()
        elif isinstance(self.class_block, nn.Identity) or self.class_block.norm.normalized_shape != (dim,):
            block = ClassBlock(dim, self.class_mlp_ratio).apply(init_weights)
            self.class_block = block.to(next(self.stem.parameters())).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map of `forward_features` -> logits, or with `pre_logits` the updated class token."""
        x = self.head.drop(self.class_block(self.head.global_pool(x)))
        return x if pre_logits else self.classify(x)

    def no_weight_decay(self) -> set[str]:
        """None beyond timm's own (biases by name and one-dimensional parameters), as the published weights had it."""
        return set()

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names -> ours (ours stay), without the class block where the model has none."""
        state_dict = remap(state_dict, OFFICIAL_NAMES)
        if isinstance(self.class_block, nn.Identity):
            return {key: value for key, value in state_dict.items() if not key.startswith("class_block.")}
        return state_dict


def init_weights(module: nn.Module) -> None:
    """For `nn.Module.apply`."""
    init_linear(module)
    init_conv_by_fan_out(module)


OFFICIAL_NAMES = [
    *[(rf"^patch_embed1\.conv\.{3 * i}\.", f"stem.conv{i + 1}.conv.") for i in range(3)],
    *[(rf"^patch_embed1\.conv\.{3 * i + 1}\.", f"stem.conv{i + 1}.bn.") for i in range(3)],
    (r"^patch_embed1\.proj\.", "stem.proj.conv."),
    (r"^patch_embed1\.norm\.", "stem.proj.norm."),
    *[(rf"^patch_embed{i + 1}\.proj\.", f"stages.{i}.downsample.conv.") for i in (1, 2, 3)],
    *[(rf"^patch_embed{i + 1}\.norm\.", f"stages.{i}.downsample.norm.") for i in (1, 2, 3)],
    *[(rf"^norm{i}\.", f"stages.{i}.downsample.norm0.") for i in (1, 2, 3)],
    *[(rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)],
    (r"^norm4\.", "class_block.norm."),
    (r"^post_network\.0\.", "class_block."),
    (r"\.attn\.", ".mixer."),
    *[(rf"\.mamba_g{k + 1}\.", f".groups.{k}.") for k in range(4)],
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
    *ss2d.OFFICIAL_NAMES,
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^dist_head\.", "head_dist."),
]


def _cfg(size: str, drive: str) -> dict:
    return imagenet_cfg(
        "",
        first_conv="stem.conv1.conv",
        classifier=DISTILLED_CLASSIFIERS,
        license="mit",
        paper_ids="arXiv:2407.13772",
        paper_name="GroupMamba: Parameter-Efficient and Accurate Group Visual State Space Model",
        origin_url="https://github.com/Amshaker/GroupMamba",
        notes=(
            f"https://drive.google.com/file/d/{drive}/view?usp=sharing",
            f"https://huggingface.co/Abdelrahman-shaker/GroupMamba-{size}",
        ),
    )


default_cfgs = generate_default_cfgs(
    {
        "groupmamba_tiny.in1k": _cfg("Tiny", "1TrYYs0uGZbja_2ONQLyfiNdp8C5ZYP1o"),
        "groupmamba_small.in1k": _cfg("Small", "1vTN9ynDcsDuOVrcT9GcQ5nBSk-hXySlh"),
        "groupmamba_base.in1k": _cfg("Base", "1A_srBeDYpsinU5W3PAEADu1saoz413EU"),
    }
)


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """GroupMamba-Tiny."""
    return build(GroupMamba, "groupmamba_tiny", pretrained, **{"drop_path_rate": 0.05, **kwargs})


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """GroupMamba-Small."""
    args = {"depths": (3, 4, 16, 3), "dims": (64, 128, 348, 512), "stem_dim": 64, "drop_path_rate": 0.05}
    return build(GroupMamba, "groupmamba_small", pretrained, **{**args, **kwargs})


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """GroupMamba-Base."""
    args = {"depths": (3, 6, 21, 3), "dims": (96, 192, 424, 512), "stem_dim": 64, "drop_path_rate": 0.05}
    return build(GroupMamba, "groupmamba_base", pretrained, **{**args, **kwargs})
