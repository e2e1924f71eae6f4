"""SS2D, the token mixer of VMamba: project, convolve, scan the map along several routes, normalise, project back.

Letters: B batch, H height, W width, C model channels, D inner channels = expand * C. A volume has a depth before H.
"""

import math

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .route_scan import RouteScan
from .routes import Routes

# What the official repositories of the family call the parts of this layer, wherever it stands -> ours.
OFFICIAL_NAMES = [
    (r"\.conv2d\.(weight|bias)$", r".conv.\1"),
    (r"\.out_norm\.(weight|bias)$", r".norm.\1"),
    (r"(?<!scan)\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)$", r".scan.\1"),
]


# torch.fx cannot follow the checks of the scan op; the layer is one node of a traced graph.
@register_notrace_module
class SS2D(nn.Module):
    """2-D selective scan (VMamba, arXiv 2401.10166, section 4.2), channels last.

    Args:
        d_model: channels C of the map.
        routes: how the map is walked; see `vssm.layers.routes`.
        d_state: states per channel.
        expand: D / C.
        d_conv: odd size of the depthwise convolution before the scan.
        dt_rank: rank of the step projection; ceil(C / 16) if None.
        gate: multiply the normalised output by SiLU of a second projection of the input.
        conv_bias: give the depthwise convolution a bias.
        spatial_dims: 2 for maps, 3 for volumes (an extension; the paper has maps only). The routes must fit.
    """

    def __init__(
        self,
        d_model: int,
        routes: Routes,
        d_state: int = 1,
        expand: float = 2.0,
        d_conv: int = 3,
        dt_rank: int | None = None,
        gate: bool = False,
        conv_bias: bool = False,
        spatial_dims: int = 2,
    ):
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, so that the convolution keeps the size of the map, got {d_conv}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        d_inner = int(expand * d_model)
        self.routes = routes
        self.gate = gate
        self.in_proj = nn.Linear(d_model, 2 * d_inner if gate else d_inner, bias=False)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        self.conv = conv(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner, bias=conv_bias)
        self.scan = RouteScan(d_inner, routes.num_routes, d_state, dt_rank or math.ceil(d_model / 16))
        self.norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C), or volume (B, depth, H, W, C) -> the same shape."""
        size = x.shape[1:-1]
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        # Channels last all the way: the convolution takes and returns that memory format.
        x = F.silu(self.conv(x.movedim(-1, 1))).movedim(1, -1)
        y = self.scan(x.flatten(1, -2), self.routes.table(size, x.device)).view(x.shape)
        # Under autocast y is float32 here: the sum over routes can exceed what half precision holds before the norm.
        y = self.norm(y)
        if self.gate:
            y = y * F.silu(z)
        return self.out_proj(y)
