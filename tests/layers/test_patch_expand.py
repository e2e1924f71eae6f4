"""Channels unfolded into neighbours, position by position, in maps and volumes."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vssm.layers.patch_expand import PatchExpand, channels_to_neighbours


@pytest.mark.parametrize(("size", "scale"), [((3, 2), 2), ((2, 3), 4), ((2, 1, 3), 2)])
def test_every_neighbour_gets_its_run_of_channels(size, scale):
    neighbours = list(itertools.product(range(scale), repeat=len(size)))
    x = torch.randn(2, *size, len(neighbours) * 5)
    y = channels_to_neighbours(x, scale)
    assert y.shape == (2, *(side * scale for side in size), 5)
    for i, shifts in enumerate(neighbours):
        part = y[(slice(None), *(slice(shift, None, scale) for shift in shifts))]
        assert torch.equal(part, x[..., 5 * i : 5 * i + 5])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_patches_expand_after_a_linear_layer_and_before_the_norm(spatial_dims):
    layer = PatchExpand(6, 3, 2, spatial_dims)
    torch.nn.init.normal_(layer.norm.weight)
    x = torch.randn(1, *[2] * spatial_dims, 6)
    want = F.layer_norm(channels_to_neighbours(x @ layer.expand.weight.T, 2), (3,), layer.norm.weight)
    torch.testing.assert_close(layer(x), want)
