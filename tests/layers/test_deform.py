"""Deformable aggregation: against bilinear sampling written out, and what its weights mean."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vssm.layers.deform import DeformableAggregation

B, H, W, C, G = 2, 5, 4, 12, 3


def sample(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Bilinear value (C,) of `image` (H, W, C) at a point; 0 outside."""
    total = torch.zeros(image.shape[2], dtype=image.dtype)
    top, left = int(y // 1), int(x // 1)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return total


def written_out(layer: DeformableAggregation, x: torch.Tensor) -> torch.Tensor:
    """The definition, position by position: taps column by column, offsets (x, y), then the weights."""
    raw = layer.offset_mask(layer.offset_mask_dw(x))[..., : layer.groups * 27].unflatten(-1, (layer.groups, 27))
    out = torch.zeros_like(x).unflatten(-1, (layer.groups, -1))
    image = x.unflatten(-1, (layer.groups, -1))
    for b in range(x.shape[0]):
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                for g in range(layer.groups):
                    values = raw[b, row, column, g]
                    for tap in range(9):
                        right = column + tap // 3 - 1 + values[2 * tap].item()
                        down = row + tap % 3 - 1 + values[2 * tap + 1].item()
                        out[b, row, column, g] += values[18 + tap] * sample(image[b, :, :, g], down, right)
    return out.flatten(-2)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(B, H, W, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smooth", [False, True])
def test_it_is_the_weighted_sum_of_bilinear_samples(x, smooth):
    torch.manual_seed(1)
    layer = DeformableAggregation(C, G, smooth).double()
    with torch.no_grad():
        # Offsets of a pixel or two, so that many samples lie outside.
        layer.offset_mask.weight.mul_(5)
        torch.testing.assert_close(layer(x), written_out(layer, x))


def test_without_offsets_and_with_one_weight_it_moves_the_map(x):
    layer = DeformableAggregation(C, 1).double()
    nn.init.zeros_(layer.offset_mask.weight)
    nn.init.zeros_(layer.offset_mask.bias)
    # Tap 1 of the official order is one column to the left, in the same row.
    with torch.no_grad():
        layer.offset_mask.bias[18 + 1] = 1.0
        moved = torch.cat([torch.zeros(B, H, 1, C, dtype=x.dtype), x[:, :, :-1]], dim=2)
        torch.testing.assert_close(layer(x), moved)


def test_groups_are_neighbouring_channels_with_weights_of_their_own(x):
    layer = DeformableAggregation(C, G).double()
    before = layer(x)
    with torch.no_grad():
        layer.offset_mask.bias[27 + 18 : 27 + 27] += 1.0
    changed = (layer(x) - before).abs().amax((0, 1, 2)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_the_outputs_of_the_linear_layer_are_padded_to_a_multiple_of_eight():
    assert DeformableAggregation(C, G).offset_mask.out_features == 88
    assert DeformableAggregation(16, 8).offset_mask.out_features == 216


def test_every_gradient_is_right(x):
    layer = DeformableAggregation(C, G, smooth=True).double()
    parameters = dict(layer.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    inputs = [
        x[:1, :3, :2].clone().requires_grad_(),
        *(p.detach().clone().requires_grad_() for p in layer.parameters()),
    ]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_in_single_and_returns_its_own_type(x, dtype):
    layer = DeformableAggregation(C, G)
    full, low = layer(x.float()), layer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype and (low.float() - full).norm() < 0.05 * full.norm()


def test_channels_that_the_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="got 10 channels and 4 groups"):
        DeformableAggregation(10, 4)


def test_sampling_counts_four_multiplications_and_additions_per_tap():
    layer = DeformableAggregation(16, 2)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(3, 5, 4, 16))
    positions = 3 * 5 * 4
    assert counter.get_total_flops() == 2 * positions * 16 * (56 + 4 * 9)
