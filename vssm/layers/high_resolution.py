"""HRNet's way of keeping several resolutions side by side (arXiv 1908.07919), with any blocks in the branches.

Branch i has 1 / 2^i of the first one's height and width, rounded up. All maps are (B, C, H, W).

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from timm.layers import ConvNormAct, register_notrace_function
from timm.models.resnet import Bottleneck
from torch import Tensor, nn


def conv_norm(
    dim: int, out_dim: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Module:
    """Convolution without bias, batch norm and, unless told otherwise, ReLU."""
    return ConvNormAct(dim, out_dim, kernel_size, stride, groups=groups, apply_act=relu, act_layer=nn.ReLU)


def bottleneck(dim: int, out_dim: int) -> nn.Module:
    """ResNet's bottleneck block (arXiv 1512.03385) with out_dim / 4 channels inside."""
    shortcut = (
        nn.Sequential(nn.Conv2d(dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim)) if dim != out_dim else None
    )
    return Bottleneck(dim, out_dim // Bottleneck.expansion, downsample=shortcut)


# torch.fx cannot follow comparisons of sizes; the function is one node of a traced graph.
@register_notrace_function
def upsampled(x: Tensor, factor: int, like: Tensor) -> Tensor:
    """x enlarged by `factor`, and then, where odd sizes were rounded up, a second time to the size of `like`."""
    x = F.interpolate(x, scale_factor=factor, mode="bilinear")
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, size=like.shape[2:], mode="bilinear")


class Transition(nn.ModuleList):
    """Inputs of a stage with one branch more than the stage before, the new one from the lowest resolution.

    Args:
        dims_before: channels of the maps that come in.
        dims: channels of the maps that go out.
    """

    def __init__(self, dims_before: Sequence[int], dims: Sequence[int]):
        kept = zip(dims_before, dims, strict=False)
        layers = [nn.Identity() if dim == out_dim else conv_norm(dim, out_dim, 3) for dim, out_dim in kept]
        super().__init__([*layers, conv_norm(dims_before[-1], dims[-1], 3, stride=2)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self, [*maps, maps[-1]], strict=True)]


class FusedMap(nn.Module):
    """One branch's share of an exchange: the sum of all branches at its resolution, then ReLU.

    Finer maps come down by depthwise 3 x 3 convolutions of stride 2, each with a pointwise one; coarser maps by a
    pointwise convolution and bilinear enlargement.

    Args:
        dims: channels of all branches.
        index: the branch whose resolution and channels come out.
    """

    def __init__(self, dims: Sequence[int], index: int):
        super().__init__()
        self.index = index
        paths = []
        for i, dim in enumerate(dims):
            if i < index:
                steps = [self._halved(dim, dim, relu=True) for _ in range(index - i - 1)]
                paths.append(nn.Sequential(*steps, self._halved(dim, dims[index], relu=False)))
            else:
                paths.append(nn.Identity() if i == index else conv_norm(dim, dims[index], 1, relu=False))
        self.paths = nn.ModuleList(paths)

    @staticmethod
    def _halved(dim: int, out_dim: int, relu: bool) -> nn.Module:
        down = conv_norm(dim, dim, 3, stride=2, groups=dim, relu=False)
        return nn.Sequential(down, conv_norm(dim, out_dim, 1, relu=relu))

    def forward(self, maps: list[Tensor]) -> Tensor:
        own = maps[self.index]
        terms = [path(x) for path, x in zip(self.paths, maps, strict=True)]
        for i in range(self.index + 1, len(terms)):
            terms[i] = upsampled(terms[i], 2 ** (i - self.index), own)
        return F.relu(sum(terms))


class HighResolutionUnit(nn.Module):
    """Every branch through blocks of its own, then an exchange between all of them.

    Args:
        branches: modules that keep the shape of their branch's map.
        dims: channels of the branches.
    """

    def __init__(self, branches: Sequence[nn.Module], dims: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.fusion = nn.ModuleList([FusedMap(dims, i) for i in range(len(dims))])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        return [fused(maps) for fused in self.fusion]


class SingleStage(nn.Module):
    """The first stage, of one resolution: bottleneck blocks, the map in a list as in the stages that follow."""

    def __init__(self, dim: int, out_dim: int, depth: int):
        super().__init__()
        self.blocks = nn.Sequential(*[bottleneck(out_dim if i else dim, out_dim) for i in range(depth)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.blocks(maps[0])]


class HighResolutionStage(nn.Module):
    """A transition and the units that follow it. Maps of `dims_before` channels -> maps of `dims` channels."""

    def __init__(self, dims_before: Sequence[int], dims: Sequence[int], units: Sequence[nn.Module]):
        super().__init__()
        self.transition = Transition(dims_before, dims)
        self.units = nn.Sequential(*units)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return self.units(self.transition(maps))


class HighResolutionNeck(nn.Module):
    """HRNet's classification neck: all resolutions, widened and added on the way down to the lowest.

    Args:
        dims: channels of the branches.
        widths: channels of the branches after widening.
        out_dim: channels of the map that comes out, at the last branch's resolution.
    """

    def __init__(self, dims: Sequence[int], widths: Sequence[int], out_dim: int):
        super().__init__()
        self.increase = nn.ModuleList([bottleneck(dim, width) for dim, width in zip(dims, widths, strict=True)])
        down = [conv_norm(width, below, 3, stride=2) for width, below in pairwise(widths)]
        self.downsample = nn.ModuleList(down)
        self.final = conv_norm(widths[-1], out_dim, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        wide = [increase(x) for increase, x in zip(self.increase, maps, strict=True)]
        total = wide[0]
        for downsample, x in zip(self.downsample, wide[1:], strict=True):
            total = downsample(total) + x
        return self.final(total)
