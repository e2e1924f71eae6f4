"""VCMamba's token mixer (arXiv 2509.04669): a selective scan along four snakes, between convolutions.

Letters: B batch, C channels, H height, W width, D inner channels = 2 * C, K = 4 routes, L = H * W steps, N states,
R rank of dt.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..ops import selective_scan
from .routes import SnakeRoutes

# A step came from nowhere (the first), or by a move to the right, left, up or down.
_MOVES = 5


def moves(order: Tensor, width: int) -> Tensor:
    """How each step of routes that only go to neighbours was reached: (K, L) integers in the order of `_MOVES`.

    Args:
        order: (K, L), the row-major position that each route visits at each step.
        width: W of the map.
    """
    down, right = (order // width).diff(dim=1), (order % width).diff(dim=1)
    reached = torch.where(right != 0, (3 - right) // 2, (7 + down) // 2)
    return F.pad(reached, (1, 0)).long()


# torch.fx cannot follow the checks of the scan op; the layer is one node of a traced graph.
@register_notrace_module
class SnakeMamba(nn.Module):
    """Convolve, scan along four snakes with shared weights, normalise, project back; maps (B, C, H, W).

    As in the official code only the input x follows a snake: dt, B and C of step t belong to position t of the
    row-major order, whichever position the snake has reached. To B comes a learnt vector for the move that led to the
    step (`direction_Bs`), and the bias of dt is added twice.

    Args:
        dim: channels C.
        d_state: states N per channel.
        expand: D / C.
        d_conv: odd size of the depthwise convolution before the scan.
    """

    # Like everywhere in this package the recurrence itself is not decayed; the official optimiser decays it.
    exempt_from_decay = ("A_log",)

    def __init__(self, dim: int, d_state: int = 16, expand: int = 2, d_conv: int = 7):
        super().__init__()
        d_inner = expand * dim
        self.routes = SnakeRoutes()
        self.dt_rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.in_conv = ConvNormAct(dim, d_inner, 1, bias=True, apply_act=False)
        self.conv = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.direction_Bs = nn.Parameter(torch.empty(_MOVES, d_state))
        trunc_normal_(self.direction_Bs, std=0.02)
        self.norm = nn.LayerNorm(d_inner)
        self.out_conv = ConvNormAct(d_inner, dim, 1, bias=True, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> map of the same shape."""
        x = F.silu(self.conv(self.in_conv(x)))
        y = self.routes.gather(self._scan(x), x.shape[2:])
        # Under autocast y is float32 here: the sum over routes can exceed what half precision holds before the norm.
        y = self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out_conv(F.relu(y))

    def _scan(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) -> outputs of the scans in the order of their steps (B, K, D, L)."""
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt, B, C = self.x_proj(x.flatten(2).transpose(1, 2)).split(sizes, dim=2)
        dt, C = self.dt_proj(dt).transpose(1, 2), C.transpose(1, 2)
        reached = moves(self.routes.table(x.shape[2:], x.device), x.shape[3])
        B = B.transpose(1, 2).unsqueeze(1) + self.direction_Bs[reached].transpose(1, 2).to(B.dtype)
        u, routes = self.routes.scatter(x), self.routes.num_routes
        # Routes go where the batch is.
        dt, C = (t.unsqueeze(1).expand(-1, routes, -1, -1).flatten(0, 1) for t in (dt, C))
        precise = torch.promote_types(self.A_log.dtype, torch.float32)
        A, D, bias = -self.A_log.to(precise).exp(), self.D.to(precise), self.dt_proj.bias.to(precise)
        y = selective_scan(u.flatten(0, 1), dt, A, B.flatten(0, 1), C, D, delta_bias=bias, delta_softplus=True)
        return y.unflatten(0, (-1, routes))
