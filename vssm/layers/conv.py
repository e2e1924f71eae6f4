"""Convolutions of channels-last maps.

Letters: B batch, H height, W width, C channels.
"""

from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution, map (B, H, W, C) -> map of the same shape and memory layout.

    Args:
        dim: channels C.
        kernel_size: odd side of the kernel.
        bias: add a bias.
    """

    def __init__(self, dim: int, kernel_size: int = 3, bias: bool = True):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the map keeps its size, got {kernel_size}")
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
