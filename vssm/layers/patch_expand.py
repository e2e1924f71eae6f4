"""Enlarging maps and volumes by unfolding channels into neighbours, the inverse of patch merging; channels last.

Letters: B batch, C channels, H height, W width. A volume has a depth before H.
"""

from torch import Tensor, nn

from .pyramid import EPS


def channels_to_neighbours(x: Tensor, scale: int) -> Tensor:
    """Map (B, H, W, scale^2 C) -> (B, scale H, scale W, C), or volume (B, depth, H, W, scale^3 C) alike.

    The channels of one neighbour lie side by side; neighbours follow each other in row-major order.
    """
    dims = x.ndim - 2
    x = x.unflatten(-1, (*[scale] * dims, -1))
    # (B, *size, *neighbours, C): every axis is followed by its neighbours, then joined with them.
    x = x.permute(0, *(axis for i in range(1, dims + 1) for axis in (i, i + dims)), -1)
    for axis in range(1, dims + 1):
        x = x.flatten(axis, axis + 1)
    return x


class PatchExpand(nn.Module):
    """Linear layer, channels to neighbours, layer norm (Swin-Unet, arXiv 2105.05537).

    Map (B, H, W, dim) -> (B, scale H, scale W, out_dim), or volume (B, depth, H, W, dim) alike.
    """

    def __init__(self, dim: int, out_dim: int, scale: int, spatial_dims: int = 2):
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale**spatial_dims * out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(channels_to_neighbours(self.expand(x), self.scale))
