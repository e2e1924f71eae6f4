"""HRVMamba's block (arXiv 2410.03174): local convolutions of four sizes, a deformable 2-D selective scan, an MLP.

All on channels-last maps.

Letters: B batch, C channels, H height, W width, D inner channels = 2 * C.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, register_notrace_module
from torch import Tensor, nn

from .channel_gate import ChannelGate
from .conv import DepthwiseConv
from .deform import DeformableAggregation
from .pyramid import EPS
from .route_scan import RouteScan
from .routes import Routes


# torch.fx cannot follow the checks of the scan op; the layer is one node of a traced graph.
@register_notrace_module
class DSS2D(nn.Module):
    """Deformable 2D selective scan: SS2D with deformable aggregation in place of its convolution. Channels last.

    Args:
        dim: channels C of the map.
        routes: how the map is walked; see `vssm.layers.routes`.
        smooth_offsets: see `DeformableAggregation`.
        gate: weigh the channels of the scan's output by squeeze-and-excitation.
    """

    def __init__(self, dim: int, routes: Routes, smooth_offsets: bool = False, gate: bool = False):
        super().__init__()
        d_inner, dt_rank = 2 * dim, math.ceil(dim / 16)
        self.routes = routes
        self.in_proj = nn.Linear(dim, d_inner, bias=False)
        self.deform = DeformableAggregation(d_inner, dt_rank, smooth_offsets)
        self.scan = RouteScan(d_inner, routes.num_routes, d_state=1, dt_rank=dt_rank)
        self.norm = nn.LayerNorm(d_inner, eps=EPS)
        self.gate = ChannelGate(d_inner) if gate else nn.Identity()
        self.out_proj = nn.Linear(d_inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> map of the same shape."""
        x = F.silu(self.deform(self.in_proj(x)))
        y = self.scan(x.flatten(1, 2), self.routes.table(x.shape[1:3], x.device)).view(x.shape)
        return self.out_proj(self.gate(self.norm(y)))


class ESInB(nn.Module):
    """Enhanced spatial inductive bias: quarters of the channels through depthwise 3, 5, 7 and 9, shuffled, GELU."""

    def __init__(self, dim: int):
        super().__init__()
        sizes = (3, 5, 7, 9)
        if dim % len(sizes):
            raise ValueError(f"channels must be divisible by {len(sizes)}, the number of kernel sizes, got {dim}")
        part = dim // len(sizes)
        self.convs = nn.ModuleList([DepthwiseConv(part, size) for size in sizes])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) -> map of the same shape."""
        parts = x.chunk(len(self.convs), dim=3)
        parts = [conv(parts[i]) for i, conv in enumerate(self.convs)]
        # Neighbouring channels come from different kernels.
        return F.gelu(torch.stack(parts, dim=-1).flatten(3))


class PositionalConv(DepthwiseConv):
    """Depthwise 3 x 3 convolution that is added to its input: map (B, H, W, C) -> map of the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


# One node of a graph traced by torch.fx: nets have so many blocks that tracing their insides would take minutes.
@register_notrace_module
class DVSSBlock(nn.Module):
    """Dynamic visual state space block: residual ESInB, DSS2D and MLP, pre-normalised. Map (B, H, W, C) -> same shape.

    Args:
        dim: channels C.
        mixer: maps (B, H, W, C) to the same shape.
        mlp_ratio: hidden channels of the MLP per channel.
        drop_path: stochastic depth.
        position: add positional convolutions before ESInB and before the MLP.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, position: bool):
        super().__init__()
        self.cpe1 = PositionalConv(dim) if position else nn.Identity()
        self.norm0 = nn.LayerNorm(dim, eps=EPS)
        self.local = ESInB(dim)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mixer = mixer
        self.cpe2 = PositionalConv(dim) if position else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.local(self.norm0(self.cpe1(x))))
        x = self.cpe2(x + self.drop_path(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))
