"""Deformable aggregation, the core of DCNv4 (arXiv 2401.06197), on channels-last maps, through torchvision's kernel.

Letters: B batch, H height, W width, C channels, G groups, T = 9 taps of the 3 x 3 neighbourhood.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops import deform_conv2d

from .conv import DepthwiseConv
from .precision import without_autocast

_KERNEL = 3
_TAPS = _KERNEL**2


# torch.fx cannot follow torchvision's checks; the layer is one node of a traced graph.
@register_notrace_module
class DeformableAggregation(nn.Module):
    """Weighted sums of nine samples around every position: map (B, H, W, C) -> map of the same shape.

    For group g, out(p) = sum over taps t of m_t(p) x(p + t + o_t(p)), bilinear between pixels and 0 outside the map;
    the offsets o (in pixels) and the weights m, which nothing normalises, are linear in the map at p. There is no
    projection before or after. Sampling is done in float32 at least: half precision cannot tell positions in large
    maps apart.

    Args:
        dim: channels C.
        groups: groups G of C / G neighbouring channels with offsets and weights of their own.
        smooth: let a depthwise 3 x 3 convolution precede the linear layer of offsets and weights.
    """

    def __init__(self, dim: int, groups: int, smooth: bool = False):
        super().__init__()
        if dim % groups:
            raise ValueError(f"channels must be divisible by the groups, got {dim} channels and {groups} groups")
        self.groups = groups
        self.offset_mask_dw = DepthwiseConv(dim) if smooth else nn.Identity()
        # Official weights are padded to a multiple of 8 outputs; nothing reads the last ones.
        outputs = groups * _TAPS * 3
        self.offset_mask = nn.Linear(dim, -(-outputs // 8) * 8)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self._sampling(x)
        batch, height, width, channels = x.shape
        precise = torch.promote_types(x.dtype, torch.float32)
        # Groups go where the batch is: torchvision then multiplies by C / G kernels of one channel instead of C.
        grouped = x.permute(0, 3, 1, 2).reshape(batch * self.groups, -1, height, width).to(precise)
        taps = grouped.new_ones(grouped.shape[1], 1, _KERNEL, _KERNEL)
        with without_autocast(x):
            y = deform_conv2d(grouped, offset.to(precise), taps, padding=_KERNEL // 2, mask=mask.to(precise))
        return y.to(x.dtype).reshape(batch, channels, height, width).permute(0, 2, 3, 1)

    def _sampling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (B*G, 2T, H, W) and weights (B*G, T, H, W) as torchvision orders them."""
        sampling = self.offset_mask(self.offset_mask_dw(x))
        sampling = sampling[..., : self.groups * _TAPS * 3].permute(0, 3, 1, 2)
        sampling = sampling.reshape(-1, _TAPS * 3, *x.shape[1:3])
        # Official weights count taps column by column, and offsets as (x, y); torchvision row by row and (y, x).
        offset = sampling[:, : _TAPS * 2].unflatten(1, (_KERNEL, _KERNEL, 2)).transpose(1, 2).flip(3).flatten(1, 3)
        mask = sampling[:, _TAPS * 2 :].unflatten(1, (_KERNEL, _KERNEL)).transpose(1, 2).flatten(1, 2)
        return offset, mask


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def _sampling_flops(x, weight, offset, mask, bias, *_, out_shape, **__) -> int:
    """2 per multiplication and addition: four neighbours of every tap of every output."""
    batch, channels, height, width = out_shape
    return 2 * 4 * batch * channels * height * width * weight[2] * weight[3]
