"""Selective scan along several routes at once, each route with weights of its own.

Letters: B batch, D channels of the map, K routes, L sequence length, N states, R rank of the step projection.
"""

import math

import torch
from torch import Tensor, nn

from ..ops import selective_scan


class RouteScan(nn.Module):
    """Input-dependent step, B and C for K routes, then one grouped selective scan (arXiv 2401.10166, section 4).

    For route k, with the rows of `x_proj_weight[k]` split into R, N and N: (t, B, C) = W_x x, delta = W_dt t + bias,
    dt = softplus(delta), A = -exp(A_logs); the scan adds D x.

    Parameters (float32 by default): x_proj_weight (K, R + 2N, D), dt_projs_weight (K, D, R), dt_projs_bias (K, D),
    A_logs (K*D, N), Ds (K*D).

    Args:
        d_inner: channels D of every sequence.
        num_routes: number of sequences K.
        d_state: states N per channel.
        dt_rank: rank R of the step projection.
    """

    # Biases and the recurrence itself are not decayed; timm's own rule sees only one-dimensional parameters.
    exempt_from_decay = ("A_logs", "Ds", "dt_projs_bias")

    def __init__(self, d_inner: int, num_routes: int, d_state: int, dt_rank: int):
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.x_proj_weight = nn.Parameter(torch.empty(num_routes, dt_rank + 2 * d_state, d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(num_routes, d_inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(num_routes, d_inner))
        self.A_logs = nn.Parameter(torch.empty(num_routes * d_inner, d_state))
        self.Ds = nn.Parameter(torch.empty(num_routes * d_inner))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        """Mamba's initialisation: A = -1..-N, D = 1, and a bias that makes dt log-uniform in [dt_min, dt_max]."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        self.x_proj_weight.uniform_(-bound, bound)
        bound = self.dt_rank**-0.5
        self.dt_projs_weight.uniform_(-bound, bound)
        dt = self.dt_projs_bias.uniform_(math.log(dt_min), math.log(dt_max)).exp()
        # Inverse of softplus.
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        states = torch.arange(1, self.d_state + 1, dtype=self.A_logs.dtype, device=self.A_logs.device)
        self.A_logs.copy_(states.log().expand_as(self.A_logs))
        self.Ds.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (B, K, D, L) -> scanned sequences of the same shape, in x's dtype (float32 under autocast)."""
        t, b, c = (self.x_proj_weight @ x).split((self.dt_rank, self.d_state, self.d_state), dim=2)
        delta = self.dt_projs_weight @ t
        precise = torch.promote_types(self.A_logs.dtype, torch.float32)
        y = selective_scan(
            x.flatten(1, 2),
            delta.flatten(1, 2),
            -self.A_logs.to(precise).exp(),
            b,
            c,
            self.Ds.to(precise),
            delta_bias=self.dt_projs_bias.flatten().to(precise),
            delta_softplus=True,
        )
        return y.view(x.shape)
