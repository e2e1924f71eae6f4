"""timm's model protocol for backbones that halve the map from stage to stage. No architecture, no option of its own.

Inside a stage maps are channels last (B, H, W, C); between stages, and in everything given out, they are (B, C, H, W)
views of the same memory, so neither convolutions nor feature extractors need copies.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence

from timm.layers import ClassifierHead
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .backbone import Backbone, checked_image


class Stage(nn.Module):
    """One level of a pyramid: `downsample` on (B, C, H, W), then `blocks` on (B, H, W, C).

    Args:
        downsample: takes the map of the level above to this level's size and channels; nn.Identity() for the first.
        blocks: modules that keep the shape of a channels-last map.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> map (B, C', H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return x.permute(0, 3, 1, 2)


def pyramid_info(dims: Sequence[int], reduction: int = 4) -> list[dict]:
    """timm's `feature_info` of `Pyramid.stages`: the first at 1 / `reduction` of the image, each next at half that."""
    return [{"num_chs": dim, "reduction": reduction * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)]


class Pyramid(Backbone):
    """What timm expects of a hierarchical backbone, written once.

    The constructor of a model sets `in_chans`, `drop_rate`, `num_features` (channels of the last stage), `stem`,
    `stages` (nn.Sequential of `Stage`), `norm` (for the last stage's map) and `feature_info` ({"num_chs", "reduction",
    "module"} per stage), then calls `reset_classifier`; the model's class has `convert_official`, see
    `vssm.checkpoint.load_official`. TorchScript is not supported.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W), any H and W from 32 up -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> normalised map (B, num_features, H/32, W/32), sizes rounded up or down as the model's stages do."""
        return self.norm(self.stages(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of `forward_features` -> logits, or with `pre_logits` what the classifier would get."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after chosen stages, before any downsampling that follows.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to give out, in this order; an int means the last n, None all.
            norm: apply the final norm to the last stage's map (the other stages have none).
            stop_early: leave out the stages after the last chosen one.
            output_fmt: "NCHW" or "NHWC", for the intermediates.
            intermediates_only: return the list alone.

        Returns:
            The list of maps, or (final map, list); the final map is that of `forward_features` unless stopped early.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        levels = self._num_levels()
        taken, last = feature_take_indices(levels, indices)
        x, maps = self._levels(x, last if stop_early else levels - 1, norm)
        intermediates = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in taken]
        return intermediates if intermediates_only else (x, intermediates)

    def _num_levels(self) -> int:
        return len(self.stages)

    def _levels(self, x: Tensor, last: int, norm: bool) -> tuple[Tensor, list[Tensor]]:
        """Final map and the maps of the levels up to `last`; for the arguments see `forward_intermediates`."""
        maps = []
        x = self._embed(x)
        for stage in self.stages[: last + 1]:
            x = stage(x)
            maps.append(x)
        if last == len(self.stages) - 1:
            x = self.norm(x)
            if norm:
                maps[-1] = x
        return x, maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen stages do not need; returns their indices from the front."""
        taken, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        # Norm and head are sized for the last stage, so they go with it.
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The final linear layer, or nn.Identity() if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of `num_classes` outputs (0: none); `global_pool` as in timm, None keeps the present one."""
        self.num_classes = num_classes
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        head = ClassifierHead(self.num_features, num_classes, pool_type=pool, drop_rate=self.drop_rate)
        self.head = head.to(next(self.stem.parameters())).train(self.training)
        self.head_hidden_size = self.num_features * head.global_pool.feat_mult()

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer groups, for layer-wise learning rates: stem, blocks (or stages), head."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def _embed(self, x: Tensor) -> Tensor:
        return self.stem(checked_image(x, self.in_chans))
