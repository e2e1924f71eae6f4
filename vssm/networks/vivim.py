"""Vivim (arXiv 2401.14168): a SegFormer for video whose stages also walk through time with tri-oriented Mamba.

Paper: "Vivim: a Video Vision Mamba for Medical Video Segmentation", Yang et al., 2024.
Code: github.com/scott-yjyang/Vivim (CC BY-NC), whose weights load with `vssm.checkpoint.load_official`.

Letters: B batch, T frames, C channels, H height, W width, N pictures (B * T).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import check_match, remap
from ..layers.multi_mamba import MultiMamba, stack_official
from ..layers.routes import TriOrientedRoutes
from ..layers.unet import check_positive

__all__ = ["Vivim"]

# The attention of the first stage looks at the map in patches of 8 and its stem reduces by 4.
_SMALLEST = 32
_STAGES = 4


class VideoMLP(nn.Module):
    """Linear, depthwise 3x3x3 convolution over the video, GELU, linear."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.conv = nn.Conv3d(ratio * channels, ratio * channels, 3, padding=1, groups=ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> the same shape."""
        return self.fc2(F.gelu(self.conv(self.fc1(x).movedim(-1, 1))).movedim(1, -1))


class TemporalMambaBlock(nn.Module):
    """The paper's temporal Mamba block: x + mixer(norm(x)), then x + mlp(norm(x)); the slices are the frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.mixer = MultiMamba(channels, TriOrientedRoutes(), mean=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = VideoMLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> the same shape."""
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FuseHead(nn.Module):
    """SegFormer's decoder (arXiv 2105.15203, section 3.2) up to its classifier: one map of all stages' maps."""

    def __init__(self, features: Sequence[int], channels: int, dropout_rate: float) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, channels) for width in features)
        self.fuse = nn.Conv2d(len(features) * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (N, C_i, H_i, W_i) of the stages -> (N, channels, H_0, W_0)."""
        size, fused = maps[0].shape[2:], 0.0
        # The weights are those of a convolution over all enlarged maps, the deepest first. Bilinear interpolation and a
        # 1x1 convolution commute, so each map goes through its part at its own resolution.
        parts = reversed(self.fuse.weight.chunk(len(maps), dim=1))
        for x, linear, part in zip(maps, self.linears, parts, strict=True):
            x = F.conv2d(F.conv2d(x, linear.weight[:, :, None, None], linear.bias), part)
            fused = fused + F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return self.dropout(F.relu(self.norm(fused)))


class Vivim(nn.Module):
    """Vivim for videos of any number of frames. The defaults are the published network on SegFormer-B3.

    The SegFormer is that of the package transformers (extra `video`), without the norm that ends each of its stages;
    `load_segformer` gives it pretrained weights. The Mamba layers start from Mamba's initialisation.

    Args:
        in_channels: channels of a frame.
        out_channels: classes.
        depths: transformer blocks of each of the four stages.
        features: channels of each stage.
        num_heads: attention heads of each stage; they divide its channels.
        mamba_depths: temporal Mamba blocks after each stage.
        hidden_size: channels of the decoder.
        drop_path_rate: largest rate of stochastic depth in the SegFormer.
        dropout_rate: dropout before the classifier.
        edge: also predict the edges of what is segmented, from the first stage.

    Raises:
        ImportError: transformers is not installed.
        ValueError: arguments that do not fit each other; in forward a video of the wrong rank, channels or size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        depths: Sequence[int] = (3, 4, 18, 3),
        features: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mamba_depths: Sequence[int] = (2, 2, 2, 2),
        hidden_size: int = 768,
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
        edge: bool = False,
    ) -> None:
        super().__init__()
        per_stage = dict(depths=depths, features=features, num_heads=num_heads, mamba_depths=mamba_depths)
        for key, values in per_stage.items():
            if len(values) != _STAGES:
                raise ValueError(f"{key} has {len(values)} entries; {_STAGES} are needed, one per stage")
            check_positive(key, values)
        for key, value in dict(in_channels=in_channels, out_channels=out_channels, hidden_size=hidden_size).items():
            check_positive(key, (value,))
        if any(width % heads for width, heads in zip(features, num_heads, strict=True)):
            raise ValueError(f"num_heads {tuple(num_heads)} must divide features {tuple(features)}, stage by stage")
        self.in_channels = in_channels
        self.segformer = _segformer(
            num_channels=in_channels,
            depths=list(depths),
            hidden_sizes=list(features),
            num_attention_heads=list(num_heads),
            drop_path_rate=drop_path_rate,
        )
        for stage in self.segformer.stages:
            stage.layer_norm = nn.Identity()
        self.temporal = nn.ModuleList(
            nn.ModuleList(TemporalMambaBlock(width) for _ in range(count))
            for width, count in zip(features, mamba_depths, strict=True)
        )
        self.decoder = FuseHead(features, hidden_size, dropout_rate)
        self.head = nn.Conv2d(hidden_size, out_channels, 1)
        self.edge_head = nn.Conv2d(features[0], 1, 1) if edge else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of every frame of a video (batch, frames, in_channels, height, width).

        Returns:
            (batch, frames, out_channels, height, width); with `edge` also the logits of edges, with one channel.

        Raises:
            ValueError: wrong rank, channels or size of `x`, or an empty one.
        """
        self._check_input(x)
        batch, frames, _, *size = x.shape
        x, maps = x.flatten(0, 1), []
        for stage, blocks in zip(self.segformer.stages, self.temporal, strict=True):
            x = stage(x).movedim(1, -1).unflatten(0, (batch, frames)).contiguous()
            for block in blocks:
                x = block(x)
            x = x.flatten(0, 1).movedim(-1, 1).contiguous()
            maps.append(x)
        logits = _enlarge(self.head(self.decoder(maps)), size).unflatten(0, (batch, frames))
        if self.edge_head is None:
            return logits
        return logits, _enlarge(self.edge_head(maps[0]), size).unflatten(0, (batch, frames))

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[2] != self.in_channels or 0 in x.shape[:2]:
            raise ValueError(
                f"Vivim needs an input (batch, frames, channels, height, width) with {self.in_channels} channels and "
                f"at least one frame, got {tuple(x.shape)}"
            )
        size = tuple(x.shape[3:])
        if min(size) < _SMALLEST:
            fitting = tuple(max(side, _SMALLEST) for side in size)
            raise ValueError(f"Vivim needs frames of at least {_SMALLEST} pixels a side, got {size}; pad to {fitting}")

    def load_segformer(self, segformer: nn.Module) -> None:
        """Copies the weights of a SegformerModel of transformers, for instance one that was trained on ImageNet.

        Raises:
            ValueError: a SegFormer of other sizes; the first weights that do not fit are listed.
        """
        weights = remap(segformer.state_dict(), [(r"^stages\.\d+\.layer_norm\.", None)])
        check_match(self.segformer, weights)
        self.segformer.load_state_dict(weights)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the official network under the names of this one; see `vssm.checkpoint.load_official`.

        Official files also hold the norms of SegFormer's stages and its classifier, which Vivim does not use.
        """
        rules = [
            (r"^encoder\.downsample_layers\.layer_norm\.|^decoder\.classifier\.", None),
            (r"^encoder\.downsample_layers\.patch_embeddings\.(\d+)\.", r"segformer.stages.\1.patch_embeddings."),
            (r"^encoder\.downsample_layers\.block\.(\d+)\.(\d+)\.", r"segformer.stages.\1.blocks.\2."),
            (r"\.layer_norm_1\.", ".layernorm_before."),
            (r"\.layer_norm_2\.", ".layernorm_after."),
            (r"\.attention\.self\.([qkv])(uery|ey|alue)\.", r".attention.\1_proj."),
            (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
            (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
            (r"\.attention\.output\.dense\.", ".attention.o_proj."),
            (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
            (r"^encoder\.stages\.(\d+)\.(\d+)\.0\.mamba\.", r"temporal.\1.\2.mixer."),
            (r"^encoder\.stages\.(\d+)\.(\d+)\.0\.mlp\.dwconv\.dwconv\.", r"temporal.\1.\2.mlp.conv."),
            (r"^encoder\.stages\.(\d+)\.(\d+)\.0\.", r"temporal.\1.\2."),
            (r"^decoder\.linear_c\.(\d+)\.proj\.", r"decoder.linears.\1."),
            (r"^decoder\.linear_fuse\.", "decoder.fuse."),
            (r"^decoder\.batch_norm\.", "decoder.norm."),
            (r"^out\.", "head."),
            (r"^edgeocr_cls_head\.", "edge_head." if self.edge_head is not None else None),
        ]
        return stack_official(remap(state_dict, rules), ("", "_b", "_s"))


def _segformer(**sizes) -> nn.Module:
    try:
        from transformers import SegformerConfig, SegformerModel
    except ImportError as error:
        raise ImportError(
            'Vivim takes its SegFormer from the package transformers, which is missing; run pip install "vssm[video]"'
        ) from error
    return SegformerModel(SegformerConfig(**sizes))


def _enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
