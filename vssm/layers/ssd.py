"""Token mixers over the state-space dual of Mamba-2, causal and non-causal.

Letters: B batch, L tokens, C channels of the model, D inner channels (expand * C), E those that are scanned, H heads of
P = E / H channels, G groups of B and C, N states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import causal_conv1d, nc_ssd, ssd
from .mamba import initial_dt_bias
from .precision import without_autocast

__all__ = ["Mamba2", "NonCausalSSD"]

_TAPS = 4
_LARGEST_HEAD = 64
# Decay rates -A at initialisation are uniform in this range.
_A_RANGE = (1.0, 16.0)


class _HeadedMixer(nn.Module):
    """What both mixers have: projections, a step size and a decay for each head, checks of sizes and input."""

    def __init__(
        self, d_model: int, d_state: int, expand: int, headdim: int | None, ngroups: int = 1, d_ssm: int | None = None
    ) -> None:
        super().__init__()
        name, inner = type(self).__name__, expand * d_model
        d_ssm = inner if d_ssm is None else d_ssm
        if headdim is None:
            headdim = max((h for h in range(1, _LARGEST_HEAD + 1) if d_ssm % h == 0), default=1)
        sizes = dict(d_model=d_model, d_state=d_state, expand=expand, headdim=headdim, ngroups=ngroups, d_ssm=d_ssm)
        for key, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: {key} is {size}; it must be at least 1")
        heads = d_ssm // headdim
        if d_ssm > inner:
            raise ValueError(f"{name}: d_ssm is {d_ssm}; there are only expand * d_model = {inner} inner channels")
        if d_ssm % headdim:
            raise ValueError(f"{name}: headdim is {headdim}; it must divide the {d_ssm} channels that are scanned")
        if heads % ngroups:
            raise ValueError(f"{name}: ngroups is {ngroups}; it must divide the {heads} heads of {headdim} channels")
        self.d_model, self.d_ssm, self.headdim, self.ngroups, self.d_state = d_model, d_ssm, headdim, ngroups, d_state
        self.mlp_width = inner - d_ssm
        self.scanned_widths = [d_ssm, ngroups * d_state, ngroups * d_state]
        self.in_proj = nn.Linear(d_model, 2 * self.mlp_width + d_ssm + sum(self.scanned_widths) + heads, bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*_A_RANGE).log())
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, C) -> gate and value of the MLP, gate z (B, L, E), [x, B, C] (B, L, E + 2 G N), dt (B, L, H)."""
        if x.ndim != 3 or x.shape[2] != self.d_model:
            needed = f"(batch, length, d_model = {self.d_model})"
            raise ValueError(f"{type(self).__name__}: the input has shape {tuple(x.shape)}; it must be {needed}")
        widths = [self.mlp_width, self.mlp_width, self.d_ssm, sum(self.scanned_widths), len(self.dt_bias)]
        return self.in_proj(x).split(widths, dim=2)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, H, P), B and C (B, L, G, N), as the ops take them."""
        x, b, c = xbc.split(self.scanned_widths, dim=2)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(2, (-1, self.headdim)), b.unflatten(2, groups), c.unflatten(2, groups)

    def _wide(self, parameter: Tensor) -> Tensor:
        # float64 models keep float64; everything else runs the recurrence with float32 coefficients.
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


class Mamba2(_HeadedMixer):
    """Mamba-2 mixer (arXiv 2405.21060, section 7) with the names of mamba_ssm, whose weights load as they are.

    [z; x; B; C; dt] = W_in u;  [x; B; C] = silu(causal_conv1d([x; B; C]));  y = ssd(x, dt, A, B, C) + D x;
    out = W_out norm(y * silu(z)), with A = -exp(A_log), softplus(dt + dt_bias) as the step size and an RMS norm of each
    group's channels. Inner channels that are not scanned are a gated MLP beside it, silu(z0) * x0.

    Under autocast everything after the convolution is computed, and the result returned, in float32.

    Args:
        d_model: channels C of the input and of the output.
        d_state: states N per channel.
        expand: inner channels per model channel.
        headdim: channels P of a head; None is the largest divisor of d_ssm up to mamba_ssm's 64.
        ngroups: groups G of heads that share B and C.
        d_ssm: inner channels E that are scanned; None is all.
        norm_before_gate: norm(y) * silu(z) instead.
        D_has_hdim: a skip weight D for each channel instead of each head.

    Raises:
        ValueError: for sizes that do not fit each other; in forward for an input that is not (B, L, d_model).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        d_ssm: int | None = None,
        norm_before_gate: bool = False,
        D_has_hdim: bool = False,
    ) -> None:
        super().__init__(d_model, d_state, expand, headdim, ngroups, d_ssm)
        self.norm_before_gate = norm_before_gate
        width = sum(self.scanned_widths)
        self.conv1d = nn.Conv1d(width, width, _TAPS, groups=width, padding=_TAPS - 1)
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else len(self.dt_bias)))
        self.norm = nn.RMSNorm(self.d_ssm, eps=1e-5)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, d_model)."""
        z0, x0, z, xbc, dt = self._project(u)
        xbc = causal_conv1d(xbc.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        x, b, c = self._heads(xbc.transpose(1, 2))
        skip, per_channel = self._wide(self.D), len(self.D) != len(self.dt_bias)
        skip = skip.unflatten(0, (-1, self.headdim)) if per_channel else skip
        dt_bias, A = self._wide(self.dt_bias), -self._wide(self.A_log).exp()
        y = ssd(x, dt, A, b, c, D=skip, dt_bias=dt_bias, dt_softplus=True).flatten(2)
        with without_autocast(y):
            y = self._gated_norm(y, F.silu(z.to(y.dtype)))
            y = torch.cat([F.silu(z0.to(y.dtype)) * x0, y], dim=2)
            return F.linear(y, self.out_proj.weight.to(y.dtype))

    def _gated_norm(self, y: Tensor, gate: Tensor) -> Tensor:
        y = y if self.norm_before_gate else y * gate
        groups = y.unflatten(2, (self.ngroups, -1))
        y = F.rms_norm(groups, groups.shape[3:], eps=self.norm.eps).flatten(2) * self.norm.weight
        return y * gate if self.norm_before_gate else y


class NonCausalSSD(_HeadedMixer):
    """VSSD's mixer (arXiv 2407.18559, section 3.2) for tokens in any arrangement: their order is of no account.

    [z; x; B; C; dt] = W_in u;  [x; B; C] = silu([x; B; C]);  y = nc_ssd(x, dt, A, B, C) + D x;
    out = W_out (norm(y) * z), with A = exp(A_log) and softplus(dt + dt_bias) as the weight of a token. VSSD's depthwise
    convolution of pictures before the activation is left out.

    Under autocast everything after W_in is computed, and the result returned, in float32: sums over many tokens can
    leave the range of float16.

    Args:
        d_model: channels C of the input and of the output.
        d_state: states N per channel.
        expand: inner channels per model channel.
        headdim: channels P of a head; None is the largest divisor of the inner channels up to 64.

    Raises:
        ValueError: for sizes that do not fit each other; in forward for an input that is not (B, L, d_model).
    """

    def __init__(self, d_model: int, d_state: int = 64, expand: int = 2, headdim: int | None = None) -> None:
        super().__init__(d_model, d_state, expand, headdim)
        self.D = nn.Parameter(torch.ones(len(self.dt_bias)))
        self.norm = nn.LayerNorm(self.d_ssm)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, d_model)."""
        *_, z, xbc, dt = self._project(u)
        x, b, c = self._heads(F.silu(xbc))
        A, skip, dt_bias = self._wide(self.A_log).exp(), self._wide(self.D), self._wide(self.dt_bias)
        y = nc_ssd(x, dt, A, b, c, D=skip, dt_bias=dt_bias, dt_softplus=True).flatten(2)
        with without_autocast(y):
            y = F.layer_norm(y, self.norm.normalized_shape, *(w.to(y.dtype) for w in self.norm.parameters()))
            return F.linear(y * z.to(y.dtype), self.out_proj.weight.to(y.dtype))
