"""Scan routes: the order they walk in, and that gathering undoes scattering."""

import pytest
import torch

from vssm.layers.routes import CrossRoutes

SIZES = [(2, 3), (1, 4), (5, 1), (1, 1)]


def test_the_cross_scan_walks_rows_columns_and_both_backwards():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]]).view(1, 1, 2, 3)
    assert CrossRoutes().scatter(x)[0, :, 0].tolist() == [
        [1, 2, 3, 4, 5, 6],
        [1, 4, 2, 5, 3, 6],
        [6, 5, 4, 3, 2, 1],
        [6, 3, 5, 2, 4, 1],
    ]


def test_gathering_takes_each_routes_output_back_to_where_its_input_came_from():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    sequences = CrossRoutes().scatter(x)
    for route in range(4):
        alone = torch.zeros_like(sequences)
        alone[:, route] = sequences[:, route]
        assert torch.equal(CrossRoutes().gather(alone, (2, 3)), x)


@pytest.mark.parametrize("size", SIZES)
def test_gathering_is_the_adjoint_of_scattering(size):
    routes, generator = CrossRoutes(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    y = torch.randn(2, routes.num_routes, 3, size[0] * size[1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close((routes.scatter(x) * y).sum(), (x * routes.gather(y, size)).sum())


@pytest.mark.parametrize("size", SIZES)
def test_sequences_are_contiguous_whatever_the_layout_of_the_map(size):
    x = torch.randn(2, *size, 3).permute(0, 3, 1, 2)
    sequences = CrossRoutes().scatter(x)
    assert sequences.shape == (2, 4, 3, size[0] * size[1]) and sequences.is_contiguous()
    assert torch.equal(sequences, CrossRoutes().scatter(x.contiguous()))


@pytest.mark.parametrize("size", SIZES)
def test_a_table_holds_the_positions_in_the_order_of_the_sequences(size):
    x = torch.randn(2, 3, *size)
    table = CrossRoutes().table(size, x.device)
    assert table.dtype == torch.int32
    sequences = CrossRoutes().scatter(x)
    for k, order in enumerate(table.long()):
        assert torch.equal(x.flatten(2)[:, :, order], sequences[:, k])


def test_a_table_is_made_once_and_serves_training_after_inference():
    with torch.inference_mode():
        table = CrossRoutes().table((3, 17), torch.device("cpu"))
    assert not table.is_inference()
    assert CrossRoutes().table((3, 17), torch.device("cpu")) is table
