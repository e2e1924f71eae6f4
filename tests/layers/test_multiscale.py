"""The mixer of MSVMamba: how routes are joined, parted and merged, and what the state does between them."""

import pytest
import torch

from vssm.layers.multiscale import MS2D, MergeThenNorm, NormThenMerge, join_routes, part_routes

both_merges = pytest.mark.parametrize("merge", [NormThenMerge, MergeThenNorm])


def test_rows_backwards_then_columns_then_columns_backwards():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, :, :, None]
    rows_back, columns, columns_back = join_routes(x).view(3, 6).tolist()
    assert rows_back == [6, 5, 4, 3, 2, 1]
    assert columns == [1, 4, 2, 5, 3, 6]
    assert columns_back == [6, 3, 5, 2, 4, 1]


@pytest.mark.parametrize("route", range(3))
def test_parting_puts_every_route_back_where_it_came_from(route):
    x = torch.randn(2, 3, 5, 4)
    joined = join_routes(x)
    alone = torch.zeros_like(joined)
    alone[:, route * 15 : (route + 1) * 15] = joined[:, route * 15 : (route + 1) * 15]
    assert torch.equal(part_routes(alone, (3, 5)), x)


def test_the_first_generation_normalises_every_step_before_adding():
    merge, full, half = NormThenMerge(8), torch.randn(1, 4, 4, 8), torch.randn(1, 12, 8)
    got = merge(full, half, (2, 2))
    torch.testing.assert_close(merge(3 * full, 5 * half, (2, 2)), got, rtol=1e-3, atol=1e-4)
    # In the middle of four equal values interpolation changes nothing.
    half = half[:, :1].expand_as(half)
    torch.testing.assert_close(merge(full, half, (2, 2)), merge.norm(full) + 3 * merge.norm(half[:, :1])[:, None])


def test_the_second_generation_repeats_values_and_normalises_the_sum():
    merge, half = MergeThenNorm(8), torch.randn(1, 12, 8)
    total = part_routes(half, (2, 2)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(merge(torch.zeros(1, 4, 4, 8), half, (2, 2)), merge.norm(total))
    assert merge(torch.zeros(1, 3, 3, 8), half, (2, 2)).shape == (1, 3, 3, 8)


def test_the_state_goes_on_from_route_to_route():
    torch.manual_seed(0)
    mixer = MS2D(8, NormThenMerge)
    x = torch.randn(1, 12, 16, requires_grad=True)
    y = mixer._along(mixer.half_scan, x)
    (into_second,) = torch.autograd.grad(y[0, 4].sum(), x)
    assert into_second[0, :5].abs().amin(1).all() and not into_second[0, 5:].any()


@both_merges
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 2), (7, 9)])
def test_maps_of_any_size_keep_their_shape_and_every_parameter_learns(merge, gate, size):
    mixer = MS2D(16, merge, expand=1.0, gate=gate)
    x = torch.randn(2, *size, 16, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    y.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters()) and torch.isfinite(x.grad).all()
