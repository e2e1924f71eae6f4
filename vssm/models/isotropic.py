"""timm's model protocol for backbones that keep one resolution: patches in a sequence, with or without a class token.

The class token, if there is one, stands in the middle of the sequence (index N // 2 of N patches), and so does its
positional embedding. What the models give out has it first, as timm's vision transformers have.

Letters: B batch, C channels, H height, W width, N patches in row-major order.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, lecun_normal_, register_notrace_function, resample_abs_pos_embed, to_2tuple
from timm.layers import trunc_normal_ as trunc_normal
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from ..layers.drop_path import drop_path_rates
from ..layers.initialise import init_linear
from ..layers.pyramid import EPS
from .backbone import Backbone, checked_image
from .building import build, imagenet_cfg

_POOLS = ("", "avg", "max", "avgmax")


class StreamNorm(nn.RMSNorm):
    """RMSNorm of a residual stream that may be more precise than the weights, whose dtype the result has."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class Block(nn.Module):
    """A pre-normalised mixer added to the residual stream (B, tokens, C), which stays in float32 (or float64)."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        """What the block adds to the stream, before stochastic depth."""
        return self.mixer(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


def quarter_ends(depth: int) -> tuple[int, ...]:
    """The blocks that end each quarter of a model."""
    return tuple(sorted({math.ceil(quarter * depth / 4) - 1 for quarter in (1, 2, 3, 4)}))


def build_isotropic(model: type[nn.Module], name: str, pretrained: bool, depth: int = 24, **kwargs) -> nn.Module:
    """`building.build`; features are, unless `out_indices` says otherwise, those after each quarter of the blocks."""
    features = {"out_indices": quarter_ends(depth), "feature_cls": "getter"}
    return build(model, name, pretrained, features, depth=depth, **kwargs)


def isotropic_cfg(url: str, **settings: object) -> dict:
    """`building.imagenet_cfg` of a model of tokens."""
    return imagenet_cfg(url, pool_size=None, first_conv="patch_embed", **settings)


class Isotropic(Backbone):
    """Patches of an image as a sequence, positional embeddings, one mixer per block; and what timm expects of that.

    Images may have any size from one patch up and are not resized: rows and columns at the bottom and right that do
    not fill a patch are left out. Where the grid of patches is not that of `img_size`, the positional embeddings are
    resampled (bicubic, without antialiasing). A model's class has `convert_official`, see
    `vssm.checkpoint.load_official`. TorchScript is not supported.

    Args:
        mixers: one module per block, on sequences (B, tokens, embed_dim), with an `out_proj`.
        embed_dim: channels C.
        img_size: height and width, or both at once, that the positional embeddings are made for.
        patch_size: side of a patch in pixels.
        stride: pixels from one patch to the next; None: `patch_size`.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: "avg", "max" or "avgmax" over the patches, "token" for the class token, "map" for `attn_pool`, ""
            for none.
        class_token: put a learned token into the middle of the sequence.
        attn_pool: module (B, N, C) -> (B, C) that pools the patches.
        norm_layer: called with `embed_dim`, for every block and the end; takes the float32 stream.
        dynamic_img_size: False refuses images of another size than `img_size`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.

    Raises:
        ValueError: a `global_pool` that is unknown or lacks its part; `img_size` below `patch_size`.
    """

    def __init__(
        self,
        mixers: Sequence[nn.Module],
        embed_dim: int,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        class_token: bool = False,
        attn_pool: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] = StreamNorm,
        dynamic_img_size: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.patch_size = patch_size
        self.stride = stride or patch_size
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.exempt_from_decay = ("pos_embed", "cls_token") if class_token else ("pos_embed",)
        self.img_size = to_2tuple(img_size)
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=self.stride)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size) + self.num_prefix_tokens, embed_dim))
        rates = drop_path_rates(drop_path_rate, [len(mixers)])[0]
        self.blocks = nn.Sequential(
            *[Block(norm_layer(embed_dim), mixer, rate) for mixer, rate in zip(mixers, rates, strict=True)]
        )
        self.norm = norm_layer(embed_dim)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.stride, "module": f"blocks.{i}"} for i in range(len(mixers))
        ]
        self.attn_pool = attn_pool
        self.reset_classifier(num_classes, global_pool)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        init_linear(self.head.fc)
        trunc_normal(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal(self.cls_token, std=0.02)
        # So that the sum over all blocks does not grow with their number.
        for block in self.blocks:
            block.mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches that the positional embeddings are made for, (rows, columns)."""
        if min(self.img_size) < self.patch_size:
            raise ValueError(f"img_size must be at least the patch size {self.patch_size}, got {self.img_size}")
        return self._grid(self.img_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of another size; its positional embeddings are resampled for good."""
        old = self.grid_size
        self.img_size = to_2tuple(img_size)
        positions = resampled(self.pos_embed.detach(), old, self.grid_size, self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W), H and W of a patch at least -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> normalised tokens (B, [1 +] N, C), the class token, if any, first."""
        x = self._embed(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self._class_first(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits, or with `pre_logits` what the classifier would get."""
        if self.global_pool == "map":
            x = self.attn_pool(x[:, self.num_prefix_tokens :])
        else:
            x = global_pool_nlc(x, self.global_pool, self.num_prefix_tokens)
        x = self.head.drop(x)
        return x if pre_logits else self.head.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        residual: bool = True,
    ) -> list | tuple[Tensor, list]:
        """Maps of patches after chosen blocks.

        Args:
            x: images (B, in_chans, H, W).
            indices: blocks to give out, in this order; an int means the last n, None all.
            return_prefix_tokens: give pairs (patches, class token (B, 1, C)), if the model has a class token.
            norm: apply the final norm to each.
            stop_early: leave out the blocks after the last chosen one.
            output_fmt: "NCHW" or "NLC", for the intermediates.
            intermediates_only: return the list alone.
            residual: False leaves the residual stream out: what the block's mixer adds to it, alone.

        Returns:
            The list, or (final tokens, list); the final ones are those of `forward_features` unless stopped early.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        size, kept = x.shape[2:], {}
        x = self._embed(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            added = checkpoint(block.branch, x) if self.grad_checkpointing else block.branch(x)
            x = x + block.drop_path(added)
            if i in taken:
                kept[i] = x if residual else added
        prefix = self.num_prefix_tokens
        outputs = [self._class_first(self.norm(kept[i]) if norm else kept[i]) for i in taken]
        maps = [y[:, prefix:] for y in outputs]
        if output_fmt == "NCHW":
            maps = [y.unflatten(1, self._grid(size)).permute(0, 3, 1, 2) for y in maps]
        if return_prefix_tokens and prefix:
            maps = list(zip(maps, (y[:, :prefix] for y in outputs), strict=True))
        return maps if intermediates_only else (self._class_first(self.norm(x)), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen blocks do not need; returns their indices from the front."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The final linear layer, or nn.Identity() if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of `num_classes` outputs (0: none); `global_pool` None keeps the present one."""
        pool = self.global_pool if global_pool is None else global_pool
        available = (*_POOLS, *["token"] * self.num_prefix_tokens, *["map"] * (self.attn_pool is not None))
        if pool not in available:
            raise ValueError(f"global_pool is {pool!r}; this model has {', '.join(map(repr, available))}")
        if pool != "map":
            self.attn_pool = None
        self.num_classes, self.global_pool = num_classes, pool
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        head = nn.Sequential(OrderedDict(drop=nn.Dropout(self.drop_rate), fc=fc))
        self.head = head.to(self.pos_embed).train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer groups, for layer-wise learning rates: stem, blocks, head; coarse ones are the same."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def fit_positions(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict` with positional embeddings of another, square grid resampled to this model's."""
        positions = state_dict.get("pos_embed")
        if positions is None or positions.shape == self.pos_embed.shape:
            return dict(state_dict)
        side = math.isqrt(positions.shape[1] - self.num_prefix_tokens)
        if side * side != positions.shape[1] - self.num_prefix_tokens:
            return dict(state_dict)
        return {**state_dict, "pos_embed": resampled(positions, (side, side), self.grid_size, self.num_prefix_tokens)}

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = ((side - self.patch_size) // self.stride + 1 for side in size)
        return height, width

    def _embed(self, x: Tensor) -> Tensor:
        x = checked_image(x, self.in_chans, self.patch_size)
        if not self.dynamic_img_size:
            x = image_of_size(x, self.img_size)
        x = self.patch_embed(x)
        return with_positions(x, self.cls_token, self.pos_embed, self.grid_size)

    def _class_first(self, x: Tensor) -> Tensor:
        return class_first(x) if self.num_prefix_tokens else x


# torch.fx cannot follow what depends on sizes; each of these functions is one node of a traced graph (none whose name
# starts with an underscore can be).
@register_notrace_function
def image_of_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x itself, if it is images of that size, else ValueError."""
    if tuple(x.shape[2:]) != size:
        raise ValueError(
            f"images must be {size[0]} x {size[1]} pixels, got {x.shape[2]} x {x.shape[3]}; resize them, make the "
            "model with that img_size, or with dynamic_img_size=True"
        )
    return x


@register_notrace_function
def class_first(x: Tensor) -> Tensor:
    """Tokens (B, N + 1, C) with the class token in the middle -> the same with the class token first."""
    middle = (x.shape[1] - 1) // 2
    return torch.cat([x[:, middle : middle + 1], x[:, :middle], x[:, middle + 1 :]], dim=1)


def class_in_the_middle(x: Tensor) -> Tensor:
    """The inverse of `class_first`."""
    after = (x.shape[1] - 1) // 2 + 1
    return torch.cat([x[:, 1:after], x[:, :1], x[:, after:]], dim=1)


def resampled(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Positional embeddings (1, tokens, C) of a grid `old` -> of a grid `new`; the class token keeps its own."""
    if old == new:
        return positions
    positions = class_first(positions) if prefix_tokens else positions
    positions = resample_abs_pos_embed(positions, list(new), list(old), prefix_tokens, antialias=False)
    return class_in_the_middle(positions) if prefix_tokens else positions


@register_notrace_function
def with_positions(x: Tensor, cls_token: Tensor | None, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Embedded patches (B, C, rows, columns) -> the stream (B, [1 +] N, C), in float32 at least."""
    positions = resampled(positions, grid, tuple(x.shape[2:]), int(cls_token is not None))
    x = x.flatten(2).transpose(1, 2)
    if cls_token is not None:
        x = class_in_the_middle(torch.cat([cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1))
    return (x + positions).to(torch.promote_types(positions.dtype, torch.float32))
