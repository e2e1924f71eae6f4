"""Patch stem and patch merging in maps and volumes, written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vssm.layers.pyramid import PatchMerging, PatchStem


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (4, 2, 6), (3, 2, 5)])
def test_merged_neighbours_come_with_the_first_axis_the_fastest(size):
    dims = len(size)
    layer = PatchMerging(3, 7, dims).double()
    torch.nn.init.normal_(layer.norm.weight)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    even = F.pad(x, [amount for side in reversed(size) for amount in (0, side % 2)])
    parts = []
    for shifts in itertools.product((0, 1), repeat=dims):
        places = (slice(shift, None, 2) for shift in reversed(shifts))
        parts.append(even[(slice(None), slice(None), *places)])
    merged = F.layer_norm(torch.cat(parts, 1).movedim(1, -1), (3 * 2**dims,), layer.norm.weight)
    torch.testing.assert_close(layer(x), (merged @ layer.reduction.weight.T).movedim(-1, 1))


@pytest.mark.parametrize("size", [(8, 13), (4, 9, 8)])
def test_patches_are_projected_and_normalised_over_their_channels(size):
    layer = PatchStem(2, 5, len(size)).double()
    torch.nn.init.normal_(layer.norm1.weight)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    patches = x
    for axis in range(2, x.ndim):
        patches = patches.unfold(axis, 4, 4)
    # (B, in, *map, *patch) -> (B, *map, in * patch)
    patches = patches.movedim(1, len(size) + 1).flatten(len(size) + 1)
    want = patches @ layer.conv1.weight.flatten(1).T + layer.conv1.bias
    want = F.layer_norm(want, (5,), layer.norm1.weight)
    torch.testing.assert_close(layer(x), want.movedim(-1, 1))
