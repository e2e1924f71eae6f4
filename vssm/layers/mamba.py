"""The Mamba mixer (arXiv 2312.00752, section 3.4): a gated selective scan along a sequence, in one direction.

Letters: B batch, L steps, C channels of the model, D inner channels (expand * C), N states, R rank of dt.
"""

from __future__ import annotations

import math

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import causal_conv1d, selective_scan
from .precision import without_autocast

__all__ = ["Mamba", "initial_dt_bias"]

# Step sizes dt at initialisation are log-uniform in this range (section 3.6).
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4


# torch.fx cannot follow the checks of the scan op; the layer is one node of a traced graph.
@register_notrace_module
class Mamba(nn.Module):
    """Mamba mixer with the parameter names and the initialisation of mamba_ssm, so that its weights load as they are.

    [u; z] = W_in x;  u = silu(causal_conv1d(u));  [dt; B; C] = W_x u;  y = selective_scan(u, W_dt dt, A, B, C, D, z);
    out = W_out y, with A = -exp(A_log) and softplus(W_dt dt + bias) as the step size.

    Under autocast the scan and W_out are computed, and the result returned, in float32: on long sequences the scan can
    leave the range of float16, which would become NaN in the next norm. The other products follow autocast.

    Args:
        d_model: channels C of the input and of the output.
        d_state: states N per inner channel.
        d_conv: taps of the causal convolution.
        expand: inner channels per model channel.
        dt_rank: rank R of the projection to step sizes; "auto" is ceil(C / 16).

    Raises:
        ValueError: for a size below 1 or an unknown dt_rank; in forward for an input that is not (B, L, d_model).
    """

    # The recurrence itself is not decayed, as the official code declares; timm's own rule sees dimensions alone.
    exempt_from_decay = ("A_log", "D")
    # The scan between convolution and gate.
    recurrence = staticmethod(selective_scan)

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | str = "auto"
    ) -> None:
        super().__init__()
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"Mamba: dt_rank is {dt_rank!r}; it must be 'auto' or a number of at least 1")
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": rank}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Mamba: {name} is {size}; it must be at least 1")
        inner = expand * d_model
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self._reset_scan_parameters()

    @torch.no_grad()
    def _reset_scan_parameters(self) -> None:
        inner, states = self.A_log.shape
        rank = self.dt_proj.in_features
        self.A_log.copy_(torch.arange(1, states + 1, dtype=torch.float32).log().expand(inner, states))
        self.D.fill_(1.0)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias.copy_(initial_dt_bias(inner))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, d_model), stored channels-first, that is with the strides of (B, d_model, L)."""
        if x.ndim != 3 or x.shape[2] != self.d_model:
            needed = f"(batch, length, d_model = {self.d_model})"
            raise ValueError(f"Mamba: the input has shape {tuple(x.shape)}; it must be {needed}")
        rank, states = self.dt_proj.in_features, self.A_log.shape[1]
        # float64 models keep float64; everything else runs the recurrence with float32 coefficients.
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        x = x.transpose(1, 2)
        to_u, to_z = self.in_proj.weight.chunk(2)
        u, z = _project(to_u, x), _project(to_z, x)
        u = causal_conv1d(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        dt, b, c = _project(self.x_proj.weight, u).split([rank, states, states], dim=1)
        y = self.recurrence(
            u,
            _project(self.dt_proj.weight, dt),
            -torch.exp(self.A_log.to(wide)),
            b,
            c,
            D=self.D.to(wide),
            z=z,
            delta_bias=self.dt_proj.bias.to(wide),
            delta_softplus=True,
        )
        with without_autocast(y):
            return _project(self.out_proj.weight.to(y.dtype), y).transpose(1, 2)


def initial_dt_bias(count: int) -> Tensor:
    """`count` biases whose softplus, the step size, is log-uniform in Mamba's range."""
    dt = torch.empty(count).uniform_(math.log(_DT_MIN), math.log(_DT_MAX)).exp().clamp(min=_DT_FLOOR)
    # The inverse of softplus, log(exp(dt) - 1), in a form that keeps small dt exact.
    return dt + torch.log(-torch.expm1(-dt))


def _project(weight: Tensor, x: Tensor) -> Tensor:
    """Weight (O, I) times x (B, I, L) -> (B, O, L), laid out as the scan reads it; nn.Linear would need a transpose."""
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)
