"""Mamba along several routes: projections in and out are shared, convolution and scan are each route's own.

Letters: B batch, P positions of a sequence, map or volume, C channels of the model, D inner channels (expand * C),
K routes, L steps of a route (here equal to P), R rank of dt, N states.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .precision import without_autocast
from .route_scan import RouteScan
from .routes import Routes

# Ours -> the official parameter of one route, with the place of that route's suffix, and how all routes' become one.
_OFFICIAL_SETS = {
    "conv1d.weight": ("conv1d{}.weight", torch.cat),
    "conv1d.bias": ("conv1d{}.bias", torch.cat),
    "scan.x_proj_weight": ("x_proj{}.weight", torch.stack),
    "scan.dt_projs_weight": ("dt_proj{}.weight", torch.stack),
    "scan.dt_projs_bias": ("dt_proj{}.bias", torch.stack),
    "scan.A_logs": ("A{}_log", torch.cat),
    "scan.Ds": ("D{}", torch.cat),
}


# torch.fx cannot follow the checks of the scan op; the layer is one node of a traced graph.
@register_notrace_module
class MultiMamba(nn.Module):
    """Vim's bidirectional mixer (arXiv 2401.09417, section 3.3), SegMamba's tri-oriented one (2401.13560, section 2.2).

    [u; z] = W_in x;  along every route k: u_k = silu(causal_conv1d_k(u)), y_k = selective_scan_k(u_k);
    out = W_out ((y_1 + ... + y_K) * silu(z)). The papers gate every route's output before adding; the gate depends on
    the position alone, so that gating the sum is the same.

    Under autocast the scan and W_out are computed, and the result returned, in float32, as in `vssm.layers.mamba`.

    Args:
        d_model: channels C of the input and of the output.
        routes: how the sequence, map or volume is walked; every route must visit every position.
        d_state: states N per inner channel.
        d_conv: taps of the causal convolutions.
        expand: inner channels per model channel.
        mean: average the routes' outputs instead of adding them.
    """

    def __init__(
        self, d_model: int, routes: Routes, d_state: int = 16, d_conv: int = 4, expand: int = 2, mean: bool = False
    ):
        super().__init__()
        inner = expand * d_model
        self.routes = routes
        self.scale = 1 / routes.num_routes if mean else 1.0
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        # The channels of route after route.
        channels = routes.num_routes * inner
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        self.scan = RouteScan(inner, routes.num_routes, d_state, math.ceil(d_model / 16))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *size, d_model) -> the same shape.

        Raises:
            ValueError: `x` has no size or other channels; the routes cannot walk it or leave positions out.
        """
        size, d_model = x.shape[1:-1], self.in_proj.in_features
        if x.ndim < 3 or x.shape[-1] != d_model:
            raise ValueError(
                f"MultiMamba: the input has shape {tuple(x.shape)}; it must be (batch, *size, d_model = {d_model})"
            )
        order = self.routes.table(size, x.device)
        if order.shape[1] != math.prod(size):
            raise ValueError(
                f"MultiMamba: {self.routes} visits {order.shape[1]} positions of a map of size {tuple(size)}; "
                "every route must visit each once"
            )
        x = x.flatten(1, -2)
        to_u, to_z = self.in_proj.weight.chunk(2)
        y = self.scan(self._convolve(F.linear(x, to_u), size), order).sum(2)
        gate = F.silu(F.linear(x, to_z)) * self.scale
        with without_autocast(y):
            return F.linear(y * gate, self.out_proj.weight.to(y.dtype)).unflatten(1, size)

    def _convolve(self, u: Tensor, size: Sequence[int]) -> Tensor:
        """Positions (B, P, D) -> what each route's convolution gives there (B, P, K, D)."""
        weights = self.conv1d.weight.unsqueeze(2).chunk(self.routes.num_routes)
        biases = self.conv1d.bias.chunk(self.routes.num_routes)
        padding = (0, weights[0].shape[3] - 1)
        convolved = []
        for way, weight, bias in zip(self.routes.along(u, size), weights, biases, strict=True):
            # As rows of images: in 2-D, convolutions work channels last; in 1-D they would copy to channels first.
            rows = F.conv2d(way.transpose(1, 2).unsqueeze(2), weight, bias, padding=padding, groups=way.shape[2])
            # Padded on both sides: the first L outputs are those that look back.
            convolved.append(rows.squeeze(2).transpose(1, 2)[:, : way.shape[1]])
        return F.silu(torch.stack(self.routes.back(convolved, size), dim=2))


def stack_official(state_dict: Mapping[str, Tensor], suffixes: Sequence[str]) -> dict[str, Tensor]:
    """`state_dict` with the official parameters of every mixer, one per route, put together as `MultiMamba` has them.

    Args:
        state_dict: official names with any prefix: x_proj.weight and x_proj_b.weight, A_log and A_b_log. Other names
            stay, and so do a mixer's if some are missing.
        suffixes: what the names of each route carry, in order: ("", "_b") or ("", "_b", "_s").
    """
    out = dict(state_dict)
    last = f"A{suffixes[-1]}_log"
    for prefix in [key.removesuffix(last) for key in state_dict if key.endswith(last)]:
        for ours, (official, join) in _OFFICIAL_SETS.items():
            keys = [prefix + official.format(suffix) for suffix in suffixes]
            if out.keys() >= set(keys):
                out[prefix + ours] = join([out.pop(key) for key in keys])
    return out
