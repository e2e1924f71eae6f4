"""Pyramids from backbones of a single scale, as the authors of Vim and LBVim and ViTDet make them."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# what configurations call it; mmdet has one in its projects only, mmpretrain's own goes before this one
MODELS.register_module("LN2d", module=LayerNorm2d)


def _double(channels: int, out: int | None = None) -> nn.Module:
    """Twice the resolution."""
    return nn.ConvTranspose2d(channels, out or channels, 2, stride=2)


@MODELS.register_module()
class VimPyramid(BaseModule):
    """Four maps of stride 16 -> strides 4, 8, 16 and 32 of the same width, as in Vim's segmentors (arXiv 2401.09417).

    Args:
        channels: of every map.
        init_cfg: of mmengine.
    """

    # The official wrapper has these layers inside its backbone.
    official_backbone_names = r"^fpn[12]\."

    def __init__(self, channels: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.fpn1 = nn.Sequential(_double(channels), nn.SyncBatchNorm(channels), nn.GELU(), _double(channels))
        self.fpn2 = nn.Sequential(_double(channels))
        self.fpn4 = nn.MaxPool2d(2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four maps (B, channels, H, W) -> (B, channels, 4 H, 4 W), twice, once and half of H and W."""
        first, second, third, fourth = maps
        return self.fpn1(first), self.fpn2(second), third, self.fpn4(fourth)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """One map of stride 16 -> strides 4, 8, 16, 32 and, by subsampling, 64 (ViTDet, arXiv 2203.16527, section 3).

    Args:
        in_channels: of the map.
        out_channels: of every level.
        num_outs: levels, 4 or 5.
        init_cfg: of mmengine.

    Raises:
        ValueError: another number of levels.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, num_outs: int = 5, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if num_outs not in (4, 5):
            raise ValueError(f"num_outs must be 4 or 5, got {num_outs}")
        half, quarter = in_channels // 2, in_channels // 4
        ups = (
            nn.Sequential(_double(in_channels, half), LayerNorm2d(half), nn.GELU(), _double(half, quarter)),
            _double(in_channels, half),
            nn.Identity(),
            nn.MaxPool2d(2, stride=2),
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                up,
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for up, width in zip(ups, (quarter, half, in_channels, in_channels), strict=True)
        )
        self.top = nn.MaxPool2d(1, stride=2) if num_outs == 5 else None

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The last of `maps` (B, in_channels, H, W) -> maps of `out_channels` at 4 H, 2 H, H, H / 2 (and H / 4)."""
        levels = [level(maps[-1]) for level in self.levels]
        return tuple(levels if self.top is None else [*levels, self.top(levels[-1])])
