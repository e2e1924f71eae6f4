"""The token mixer of VSSD: Mamba-2's projections around a scan without an order (NC-SSD).

Letters: B batch, H height, W width, C model channels, D inner channels = expand * C, N states.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import nc_ssd
from .conv import DepthwiseConv
from .initialise import init_step_bias


# torch.fx cannot follow the checks of the op; the layer is one node of a traced graph.
@register_notrace_module
class NCSSD2D(nn.Module):
    """Non-causal state-space duality of a map, channels last (VSSD, arXiv 2407.18559).

    [z; x; B; C; dt] = W_in u;  [x; B; C] = silu(depthwise 3x3 conv);  y = nc_ssd(x, softplus(dt + dt_bias), exp(A_log),
    B, C) + D x;  out = W_out (LayerNorm(y) * z). The gate z has no activation. B and C are shared by all heads.

    Args:
        d_model: channels C of the map.
        num_heads: heads; each has D / num_heads channels and its own step size, A and D.
        d_state: states N.
        expand: D / C.

    Raises:
        ValueError: the heads do not divide the inner channels.
    """

    def __init__(self, d_model: int, num_heads: int, d_state: int = 64, expand: int = 2):
        super().__init__()
        d_inner = expand * d_model
        if d_inner % num_heads:
            raise ValueError(f"num_heads must divide the {d_inner} inner channels, got {num_heads}")
        self.sizes = [d_inner, d_inner + 2 * d_state, num_heads]
        self.split = [d_inner, d_state, d_state]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv = DepthwiseConv(self.sizes[1])
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's initialisation of the scan: A uniform in [1, 16], D = 1, dt log-uniform in [0.001, 0.1]."""
        init_step_bias(self.dt_bias)
        self.A_log.copy_(self.A_log.uniform_(1, 16).log())
        self.D.fill_(1.0)

    def forward(self, u: Tensor) -> Tensor:
        """Map (B, H, W, C) -> map of the same shape."""
        z, xbc, dt = self.in_proj(u).split(self.sizes, dim=-1)
        x, b, c = F.silu(self.conv(xbc)).flatten(1, 2).split(self.split, dim=-1)
        precise = torch.promote_types(self.A_log.dtype, torch.float32)
        y = nc_ssd(
            x.unflatten(-1, (len(self.A_log), -1)),
            dt.flatten(1, 2),
            self.A_log.to(precise).exp(),
            b.unsqueeze(2),
            c.unsqueeze(2),
            D=self.D.to(precise),
            dt_bias=self.dt_bias.to(precise),
            dt_softplus=True,
        )
        # Under autocast y is float32 here: a sum over all positions can exceed what half precision holds.
        return self.out_proj(self.norm(y.flatten(2).view(z.shape)) * z)
