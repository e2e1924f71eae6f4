"""MSVMamba's token mixer: one route at full resolution, three at half of it, read one after the other by a single scan.

Letters: B batch, H height, W width, C model channels, D inner channels = expand * C; h, w half of H and W, rounded up.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .channel_gate import ChannelGate
from .pyramid import EPS, channels_last
from .route_scan import RouteScan
from .routes import Routes


@dataclass(frozen=True)
class RowRoute(Routes):
    """Row-major order alone, for any number of sizes."""

    num_routes = 1

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        return np.arange(math.prod(size))[None]


def join_routes(x: Tensor) -> Tensor:
    """Map (B, h, w, D) -> its rows backwards, its columns and its columns backwards as one sequence (B, 3hw, D)."""
    rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
    return torch.cat([rows.flip(1), columns, columns.flip(1)], dim=1)


def part_routes(y: Tensor, size: tuple[int, int]) -> Tensor:
    """The way back from `join_routes`: sequence (B, 3hw, D) -> sum of the three maps (B, h, w, D) of `size` (h, w)."""
    rows_back, columns, columns_back = y.chunk(3, dim=1)
    rows, columns = rows_back.flip(1), columns + columns_back.flip(1)
    return rows.unflatten(1, size) + columns.unflatten(1, size[::-1]).transpose(1, 2)


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """`F.interpolate` of a map (B, h, w, D) to (B, *size, D)."""
    return F.interpolate(x.permute(0, 3, 1, 2), size=size, mode=mode).permute(0, 2, 3, 1)


class NormThenMerge(nn.Module):
    """First generation: every step of both scans is normalised; the half map is enlarged bilinearly and added."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, full: Tensor, half: Tensor, half_size: tuple[int, int]) -> Tensor:
        """Map (B, H, W, D) and joined sequence (B, 3hw, D) of a map of `half_size` -> map (B, H, W, D)."""
        half = part_routes(self.norm(half), half_size)
        return self.norm(full) + resize(half, full.shape[1:3], "bilinear")


class MergeThenNorm(nn.Module):
    """Second generation: the half map is enlarged by repeating its nearest values and added; the sum is normalised."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, full: Tensor, half: Tensor, half_size: tuple[int, int]) -> Tensor:
        """As `NormThenMerge`."""
        half = part_routes(half, half_size)
        return self.norm(full + resize(half, full.shape[1:3], "nearest"))


# torch.fx cannot follow the checks of the scan op; the layer is one node of a traced graph.
@register_notrace_module
class MS2D(nn.Module):
    """Multi-scale 2-D scan (MS2D of MSVMamba, arXiv 2405.14174), channels last.

    Args:
        d_model: channels C of the map.
        merge_layer: class called with D; its instance is called with the outputs of both scans and the half size.
        expand: D / C.
        gate: multiply the output by SiLU of a second projection of the input.
    """

    def __init__(self, d_model: int, merge_layer: type[nn.Module], expand: float = 2.0, gate: bool = True):
        super().__init__()
        d_inner, dt_rank = int(expand * d_model), math.ceil(d_model / 16)
        self.route = RowRoute()
        self.gate = gate
        self.in_proj = nn.Linear(d_model, 2 * d_inner if gate else d_inner, bias=False)
        self.conv = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.half_conv = nn.Conv2d(d_inner, d_inner, 7, stride=2, padding=3, groups=d_inner)
        self.scan = RouteScan(d_inner, 1, d_state=1, dt_rank=dt_rank)
        self.half_scan = RouteScan(d_inner, 1, d_state=1, dt_rank=dt_rank)
        self.merge = merge_layer(d_inner)
        self.se = ChannelGate(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> map of the same shape."""
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        # Once for both convolutions: what `chunk` gives is not dense.
        x = channels_last(x.permute(0, 3, 1, 2))
        full = F.silu(self.conv(x)).permute(0, 2, 3, 1)
        half = F.silu(self.half_conv(x)).permute(0, 2, 3, 1)
        # The state goes on from one of the joined routes into the next.
        y_full = self._along(self.scan, full.flatten(1, 2)).view(full.shape)
        y_half = self._along(self.half_scan, join_routes(half))
        # Under autocast both are float32 here, and stay so in the sums and the norm.
        y = self.se(self.merge(y_full, y_half, half.shape[1:3]))
        if self.gate:
            y = y * F.silu(z)
        return self.out_proj(y)

    def _along(self, scan: RouteScan, x: Tensor) -> Tensor:
        return scan(x, self.route.table(x.shape[1:2], x.device))
