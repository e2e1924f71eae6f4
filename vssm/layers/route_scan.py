"""Selective scan along several routes at once, each route with weights of its own.

Letters: B batch, P positions of a map or volume, D its channels, K routes, L steps, N states, R rank of dt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import cross_selective_scan
from .initialise import init_step_bias


class RouteScan(nn.Module):
    """Input-dependent step, B and C for K routes, then one scan along all of them (arXiv 2401.10166, section 4).

    For route k, with the rows of `x_proj_weight[k]` split into R, N and N: (t, B, C) = W_x x, delta = W_dt t + bias,
    dt = softplus(delta), A = -exp(A_logs); the scan adds D x.

    Parameters (float32 by default): x_proj_weight (K, R + 2N, D), dt_projs_weight (K, D, R), dt_projs_bias (K, D),
    A_logs (K*D, N), Ds (K*D).

    Args:
        d_inner: channels D of the map.
        num_routes: number of routes K.
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
    def reset_parameters(self) -> None:
        """Mamba's initialisation: A = -1..-N, D = 1, and a bias that makes dt log-uniform in [0.001, 0.1]."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        self.x_proj_weight.uniform_(-bound, bound)
        bound = self.dt_rank**-0.5
        self.dt_projs_weight.uniform_(-bound, bound)
        init_step_bias(self.dt_projs_bias)
        states = torch.arange(1, self.d_state + 1, dtype=self.A_logs.dtype, device=self.A_logs.device)
        self.A_logs.copy_(states.log().expand_as(self.A_logs))
        self.Ds.fill_(1.0)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Scans along K routes, in x's dtype (float32 under autocast).

        Args:
            x: inputs of all routes (B, P, D), or of each route (B, P, K, D).
            order: int32 (K, L), the position that each route visits at each step, -1 for padding.

        Returns:
            The sum over routes (B, P, D), or the outputs of all (B, P, K, D).
        """
        if x.ndim == 4:
            dt_b_c = torch.einsum("bpkd,krd->bpkr", x, self.x_proj_weight)
        else:
            dt_b_c = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, self.x_proj_weight.shape[:2])
        precise = torch.promote_types(self.A_logs.dtype, torch.float32)
        shape = self.dt_projs_bias.shape
        return cross_selective_scan(
            x,
            dt_b_c,
            self.dt_projs_weight,
            -self.A_logs.to(precise).exp().view(*shape, self.d_state),
            order,
            self.Ds.to(precise).view(shape),
            self.dt_projs_bias.to(precise),
        )
