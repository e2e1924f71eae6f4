"""The depthwise convolution of channels-last maps."""

import pytest
import torch

from vssm.layers.conv import DepthwiseConv


@pytest.mark.parametrize(("size", "bias"), [(3, True), (5, False)])
def test_every_channel_is_convolved_alone_and_the_layout_is_kept(size, bias):
    torch.manual_seed(0)
    layer, x = DepthwiseConv(4, size, bias), torch.randn(2, 6, 5, 4)
    y = layer(x)
    assert y.shape == x.shape and y.is_contiguous() and (layer.bias is not None) == bias
    for channel in range(4):
        kernel, shift = layer.weight[channel, None], layer.bias[channel, None] if bias else None
        alone = torch.nn.functional.conv2d(x[:, None, ..., channel], kernel, shift, padding=size // 2)
        torch.testing.assert_close(y[..., channel], alone[:, 0])


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd, so that the map keeps its size, got 4"):
        DepthwiseConv(8, 4)
