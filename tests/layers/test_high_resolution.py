"""Branches of several resolutions: sizes, what is added to what, and how maps grow."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from vssm.layers.high_resolution import (
    FusedMap,
    HighResolutionNeck,
    HighResolutionStage,
    HighResolutionUnit,
    Transition,
    upsampled,
)

DIMS = (4, 8, 16)


def maps(height: int = 13, width: int = 7, dims=DIMS) -> list[torch.Tensor]:
    """One map per branch of an image that gives the first one `height` and `width`; later ones rounded up."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(dims))]
    return [torch.randn(2, dim, *size, generator=generator) for dim, size in zip(dims, sizes, strict=True)]


def shapes(tensors) -> list[tuple[int, ...]]:
    return [tuple(t.shape[1:]) for t in tensors]


def test_a_transition_keeps_equal_channels_changes_others_and_adds_half_the_lowest_resolution():
    layer = Transition((4, 6), (4, 8, 16))
    assert isinstance(layer[0], nn.Identity) and not isinstance(layer[1], nn.Identity)
    inputs = maps(dims=(4, 6))
    out = layer.eval()(inputs)
    assert out[0] is inputs[0]
    assert shapes(out) == [(4, 13, 7), (8, 7, 4), (16, 4, 2)]
    torch.testing.assert_close(out[2], layer[2](inputs[1]))


@pytest.mark.parametrize("index", range(3))
def test_a_fused_map_is_the_rectified_sum_of_all_branches_at_its_resolution(index):
    torch.manual_seed(0)
    layer, inputs = FusedMap(DIMS, index).eval(), maps(16, 8)
    total = 0
    for i, (path, x) in enumerate(zip(layer.paths, inputs, strict=True)):
        term = path(x)
        total = total + (F.interpolate(term, scale_factor=2 ** (i - index), mode="bilinear") if i > index else term)
    torch.testing.assert_close(layer(inputs), total.relu())
    assert layer.paths[index](inputs[index]) is inputs[index]
    # Every branch counts.
    for i in range(3):
        changed = [x + 1 if i == j else x for j, x in enumerate(inputs)]
        assert not torch.allclose(layer(changed), layer(inputs))


def test_paths_down_halve_as_often_as_needed_with_relu_between_but_not_before_the_sum():
    path = FusedMap(DIMS, 2).paths[0]
    assert len(path) == 2
    relus = [isinstance(m.act, nn.ReLU) for m in path.modules() if isinstance(m, BatchNormAct2d)]
    assert relus == [False, True, False, False]
    assert shapes([path.eval()(maps(16, 8)[0])]) == [(16, 4, 2)]


def test_maps_grow_by_the_factor_first_and_then_to_the_size_of_odd_maps():
    x = torch.arange(4.0).view(1, 1, 1, 4)
    assert torch.equal(upsampled(x, 2, torch.empty(1, 1, 2, 8)), F.interpolate(x, scale_factor=2, mode="bilinear"))
    twice = F.interpolate(F.interpolate(x, scale_factor=2, mode="bilinear"), size=(1, 7), mode="bilinear")
    assert torch.equal(upsampled(x, 2, torch.empty(1, 1, 1, 7)), twice)
    assert not torch.allclose(twice, F.interpolate(x, size=(1, 7), mode="bilinear"))


def test_a_stage_keeps_sizes_and_passes_through_branches_and_exchanges():
    torch.manual_seed(0)
    unit = HighResolutionUnit([nn.Conv2d(dim, dim, 1) for dim in DIMS], DIMS)
    stage = HighResolutionStage(DIMS[:2], DIMS, [unit]).eval()
    inputs = maps(dims=DIMS[:2])
    out = stage(inputs)
    assert shapes(out) == [(4, 13, 7), (8, 7, 4), (16, 4, 2)]
    mixed = [branch(x) for branch, x in zip(unit.branches, stage.transition(inputs), strict=True)]
    for fused, got in zip(unit.fusion, out, strict=True):
        torch.testing.assert_close(fused(mixed), got)


def test_the_neck_adds_every_resolution_on_the_way_down():
    torch.manual_seed(0)
    neck, inputs = HighResolutionNeck(DIMS, (8, 16, 32), 24).eval(), maps()
    first, second, third = (layer(x) for layer, x in zip(neck.increase, inputs, strict=True))
    total = neck.downsample[1](neck.downsample[0](first) + second) + third
    torch.testing.assert_close(neck(inputs), neck.final(total))
    assert shapes([neck(inputs)]) == [(24, 4, 2)]
