"""MHS-VM (arXiv 2406.05992): VM-UNet whose blocks scan subspaces along curves of their own and attend to the routes.

Paper: "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", Ji, 2024.
Code: github.com/PixDeep/MHS-VM (Apache-2.0), whose weights load with `vssm.checkpoint.load_official`. Nothing here is
taken from it. The official network reads its routes from a file made for one image size and applies the sigmoid itself;
here they follow from the size of the map, and logits come out.

Letters: B batch, H height, W width, P = H W positions, C channels, D channels of a head, K routes of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.route_scan import RouteScan
from ..layers.routes import DiagonalRoutes, RasterRoutes, Routes, SnakeRoutes, SpiralRoutes
from .vmunet import VSSUNet

__all__ = ["MHSVMUNet"]

# Official letter of each head, in the order in which the heads share the channels out.
HEADS = {"C": SnakeRoutes(), "X": DiagonalRoutes(), "S": SpiralRoutes(), "Z": RasterRoutes()}


def scan_route_attention(y: Tensor, threshold: float) -> Tensor:
    """Outputs of K routes (B, P, K, D) -> their gated sum (B, P, D), after "scan route attention" of arXiv 2406.05992.

    The sum is multiplied by ReLU(cv - threshold), where cv = std / (mean of what exceeds the smallest + 1e-5) is the
    relative coefficient of variation over the routes. Of four routes it is 2 where one stands out upwards and 2/3 where
    one stands out downwards, and less only where they agree up to some 1e-5: there a small threshold screens out.
    """
    excess = y - y.amin(2, keepdim=True)
    mean = excess.mean(2, keepdim=True)
    # Not torch.std, which takes 30 times as long over an inner axis. The floor keeps the slope at zero finite.
    variance = (excess - mean).square().sum(2) / (y.shape[2] - 1)
    deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    return y.sum(2) * F.relu(deviation / (mean.squeeze(2) + 1e-5) - threshold)


class ScanHead(nn.Module):
    """Scans of one subspace along the routes of one head, joined by scan route attention."""

    def __init__(self, dim: int, routes: Routes, d_state: int, sra_threshold: float) -> None:
        super().__init__()
        self.routes = routes
        self.sra_threshold = sra_threshold
        self.scan = RouteScan(dim, routes.num_routes, d_state, math.ceil(dim / 16))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) -> sequence (B, P, D)."""
        order = self.routes.table(x.shape[1:3], x.device)
        x = x.flatten(1, 2).unsqueeze(2).expand(-1, -1, self.routes.num_routes, -1)
        return scan_route_attention(self.scan(x, order), self.sra_threshold)


class MultiHeadScan(nn.Module):
    """Project, convolve, scan every head's share of the channels, join, normalise twice, gate. No expansion.

    Args:
        d_model: channels C of the map; each head gets C / num_heads of them, rounded down.
        num_heads: how many of the snake, diagonal, spiral and raster heads there are, in this order.
        d_state: states per channel of the scans.
        sra_threshold: threshold of the scan route attention.
    """

    def __init__(self, d_model: int, num_heads: int, d_state: int, sra_threshold: float) -> None:
        super().__init__()
        dim = d_model // num_heads
        routes = list(HEADS.values())[:num_heads]
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.conv = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model)
        self.head_proj = nn.Linear(d_model, num_heads * dim, bias=False)
        self.heads = nn.ModuleList(ScanHead(dim, walk, d_state, sra_threshold) for walk in routes)
        self.head_norm = nn.LayerNorm(num_heads * dim)
        self.join = nn.Linear(num_heads * dim, d_model, bias=False)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> map of the same shape."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.movedim(-1, 1))).movedim(1, -1)
        shares = self.head_proj(x).chunk(len(self.heads), dim=-1)
        y = torch.cat([head(share) for head, share in zip(self.heads, shares, strict=True)], dim=-1)
        y = self.join(self.head_norm(y)).view(x.shape)
        return self.norm(y) * F.silu(z)


class MHSVMUNet(VSSUNet):
    """MHS-VM's U-Net, in 2-D: 17.3 million parameters with the published settings, which are the defaults.

    Args:
        spatial_dims: 2; the curves are curves in a plane.
        in_channels: channels of the image.
        out_channels: classes; 1 for a binary task, whose logit needs a sigmoid.
        num_heads: scan heads, 1 to 4: the first of snake, diagonals, spiral and raster. The authors have 3 or 4.
        sra_threshold: a position counts where the variation over the routes exceeds it. The authors train with 0.5 on
            ISIC 2018 and 0.0 on ISIC 2017, and evaluate their released weights with 0.4.
        depths, decoder_depths, features, d_state, drop_path_rate: as in `VMUNet`.

    Raises:
        ValueError: arguments that do not fit each other; in forward an image of the wrong rank, channels or size.

    Example:
        >>> MHSVMUNet(2, 3, 1, num_heads=3)(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 1, 64, 96])
    """

    # The official file holds two kinds of tensors twice, under the names on the left of the first and the last rule.
    mixer_names = [
        (r"\.mhs\.x_ssproj_W$", ".mhs.x_ssproj.weight"),
        (r"\.mhs\.x_ssproj\.", ".head_proj."),
        (r"\.mhs\.cat_norm\.", ".head_norm."),
        (r"\.mhs\.y_proj\.", ".join."),
        *((rf"\.mhs\.scanhead_{letter}\.", f".heads.{i}.") for i, letter in enumerate(HEADS)),
        (r"\.(mambaeng|scanning\.seq2seq_engine)\.", "."),
    ]

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        num_heads: int = 4,
        sra_threshold: float = 0.5,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        features: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
    ) -> None:
        if spatial_dims != 2:
            raise ValueError(f"spatial_dims is {spatial_dims}; MHSVMUNet walks curves in a plane, so it must be 2")
        if not 1 <= num_heads <= len(HEADS):
            raise ValueError(f"num_heads is {num_heads}; it must be 1 to {len(HEADS)}")
        if min(features, default=0) < num_heads:
            raise ValueError(f"features is {tuple(features)}; each of the {num_heads} heads needs a channel")

        def make_mixer(dim: int) -> MultiHeadScan:
            return MultiHeadScan(dim, num_heads, d_state, sra_threshold)

        super().__init__(
            spatial_dims, in_channels, out_channels, depths, decoder_depths, features, drop_path_rate, make_mixer
        )
