"""Scan routes: the orders they walk in, and that gathering undoes scattering."""

import copy
import json
import math
import pickle
from pathlib import Path

import parity
import pytest
import torch

from vssm.layers import curves
from vssm.layers.routes import (
    AtrousRoutes,
    BidirectionalRoutes,
    CrossRoutes,
    CurveRoutes,
    DiagonalRoutes,
    GivenRoutes,
    RasterRoutes,
    SelectedRoutes,
    SnakeRoutes,
    SpiralRoutes,
    TriOrientedRoutes,
    WindowRoutes,
)
from vssm.layers.ss2d import SS2D

GOLDEN = Path(__file__).parents[1] / "golden"
PLANE = [
    CrossRoutes(),
    BidirectionalRoutes(),
    AtrousRoutes(),
    RasterRoutes(),
    SnakeRoutes(),
    DiagonalRoutes(),
    SpiralRoutes(),
    WindowRoutes(3),
    SelectedRoutes(RasterRoutes(), (2,)),
    TriOrientedRoutes(),
    *(CurveRoutes(curve, 8) for curve in curves.CURVES),
]
CASES = [(routes, size) for routes in PLANE for size in [(2, 3), (1, 4), (5, 1), (1, 1), (7, 6)]]
CASES += [(CrossRoutes(3), (2, 3, 4)), (BidirectionalRoutes(), (3, 2, 2)), (TriOrientedRoutes(2), (4, 3, 2))]


def lists(routes, *size):
    return routes.orders(size).tolist()


def test_the_cross_scan_walks_rows_columns_and_both_backwards():
    assert lists(CrossRoutes(), 2, 3) == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_the_cross_scan_of_a_volume_walks_every_axis_as_the_fastest_once_there_and_back():
    ways = CrossRoutes(3).orders((2, 3, 4))
    # Positions are 12 i + 4 j + k: the first step of each way forwards goes along its fastest axis.
    assert (ways[:3, 1] - ways[:3, 0]).tolist() == [1, 12, 4]
    assert ways[3:].tolist() == ways[:3, ::-1].tolist()


def test_the_atrous_scan_walks_four_phases_and_pads_odd_maps():
    assert lists(AtrousRoutes(), 4, 2) == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert lists(AtrousRoutes(), 3, 3) == [[0, 2, 6, 8], [3, -1, 5, -1], [1, -1, 7, -1], [4, -1, -1, -1]]


def test_the_tri_oriented_scan_goes_on_to_the_next_slice_after_every_voxel():
    assert lists(TriOrientedRoutes(), 2, 1, 3)[2] == [0, 3, 1, 4, 2, 5]
    assert lists(TriOrientedRoutes(3), 2, 1, 3)[2] == [0, 2, 4, 1, 3, 5]


def test_selected_routes_are_those_of_the_given_numbers_in_that_order():
    routes = SelectedRoutes(CrossRoutes(), (3, 1))
    assert routes.num_routes == 2 and lists(routes, 2, 3) == [[5, 2, 4, 1, 3, 0], [0, 3, 1, 4, 2, 5]]


def test_windows_are_walked_one_after_the_other_and_cut_at_the_border():
    assert lists(WindowRoutes(2), 3, 3)[:2] == [[0, 1, 3, 4, 2, 5, 6, 7, 8], [0, 3, 1, 4, 6, 7, 2, 5, 8]]


@pytest.mark.parametrize("size", ["4x6", "5x3", "2x3"])
def test_the_routes_of_mhs_vm_are_the_official_ones(size):
    official = json.loads((GOLDEN / "scan_orders.json").read_text())["mhs_vm"][size]
    heads = {"C": SnakeRoutes(), "X": DiagonalRoutes(), "S": SpiralRoutes(), "Z": RasterRoutes()}
    for head, routes in heads.items():
        ways = lists(routes, *map(int, size.split("x")))
        assert ways == [way for k in (0, 1) for way in (official[f"{head}{k}"], official[f"{head}{k}"][::-1])]


@pytest.mark.parametrize("size", ["4", "8", "16"])
def test_the_curves_of_mambaad_are_the_official_ones(size):
    official = json.loads((GOLDEN / "scan_orders.json").read_text())["mambaad"]
    names = {"sweep": "raster", "scan": "snake", "zigzag": "zigzag", "zorder": "zorder", "hilbert": "hilbert"}
    checked = 0
    for official_name, name in names.items():
        if size in official[official_name]:
            assert lists(CurveRoutes(name, 2), int(size), int(size))[0] == official[official_name][size]
            checked += 1
    assert checked


@pytest.mark.parametrize("curve", ["zorder", "hilbert"])
def test_curves_on_other_sizes_visit_places_in_the_order_of_the_enclosing_square(curve):
    inside, whole = lists(CurveRoutes(curve, 2), 5, 7)[0], lists(CurveRoutes(curve, 2), 8, 8)[0]
    assert inside == [row * 7 + column for row, column in (divmod(p, 8) for p in whole) if row < 5 and column < 7]


@pytest.mark.parametrize("name", ["mambaad_hss", "mambaad_hss_zigzag2", "mambaad_hss_zorder4"])
def test_a_mambaad_block_on_these_routes_gives_the_official_output(name):
    golden = parity.load(GOLDEN / f"{name}.json")
    arguments = golden["source"]["kwargs"]
    routes = CurveRoutes(arguments["scan_type"], arguments["num_direction"])
    mixer = SS2D(arguments["hidden_dim"], routes, d_state=16, gate=True, conv_bias=True)
    official = {key: torch.from_numpy(value) for key, value in parity.fill_state(golden["state"]).items()}
    names = {
        "ss2d": "scan",
        "conv2d": "conv",
        "out_norm": "norm",
        **dict.fromkeys(("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"), "scan"),
    }
    state = {}
    for key, tensor in official.items():
        if key.startswith("self_attention.") and "scans.index" not in key:
            head, _, rest = key.removeprefix("self_attention.").partition(".")
            parent = names.get(head, head)
            state[f"{parent}.{rest}" if rest else f"{parent}.{head}"] = tensor
    mixer.load_state_dict(state)
    x = torch.from_numpy(parity.fill_input(golden["input"]))
    norm = torch.nn.functional.layer_norm(x, x.shape[-1:], official["ln_1.weight"], official["ln_1.bias"], 1e-5)
    with torch.no_grad():
        assert parity.relative_error(x + mixer(norm), golden["outputs"]["out"]) < 1e-5


@pytest.mark.parametrize("routes,size", CASES, ids=str)
def test_every_route_visits_each_position_once_or_leaves_it_to_another(routes, size):
    table = routes.table(size)
    assert table.dtype == torch.int32 and table.shape[0] == routes.num_routes and table.is_contiguous()
    for route in table:
        visited = route[route >= 0]
        assert len(visited.unique()) == len(visited)
    assert table[table >= 0].unique().tolist() == list(range(torch.Size(size).numel()))


@pytest.mark.parametrize("routes,size", CASES, ids=str)
def test_gathering_is_the_adjoint_of_scattering(routes, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    sequences = routes.scatter(x)
    assert sequences.shape[:3] == (2, routes.num_routes, 3) and sequences.is_contiguous()
    y = torch.randn(sequences.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((sequences * y).sum(), (x * routes.gather(y, size)).sum())


@pytest.mark.parametrize("routes,size", CASES, ids=str)
def test_gathering_takes_each_routes_output_back_to_where_its_input_came_from(routes, size):
    x = torch.arange(1.0, 1 + torch.Size(size).numel()).view(1, 1, *size)
    sequences = routes.scatter(x)
    for k in range(routes.num_routes):
        alone = torch.zeros_like(sequences)
        alone[:, k] = sequences[:, k]
        visited = torch.zeros(x.numel(), dtype=torch.bool)
        visited[[p for p in routes.orders(size)[k] if p >= 0]] = True
        assert torch.equal(routes.gather(alone, size), x * visited.view(x.shape))


@pytest.mark.parametrize(("routes", "size"), CASES)
def test_sequences_one_by_one_are_those_of_the_tables_and_lead_back_to_their_positions(routes, size):
    x = torch.randn(2, math.prod(size), 3)
    sequences = routes.along(x, size)
    want = routes.scatter(x.transpose(1, 2).unflatten(2, size))
    assert len(sequences) == routes.num_routes
    for k, sequence in enumerate(sequences):
        assert torch.equal(sequence, want[:, k].transpose(1, 2))
    for visited, got in zip(routes.orders(size), routes.back(sequences, size), strict=True):
        passed = torch.zeros(math.prod(size), 1)
        passed[visited[visited >= 0]] = 1.0
        assert torch.equal(got, x * passed)


def test_steps_of_padding_are_zero():
    sequences = AtrousRoutes().scatter(torch.ones(1, 1, 3, 3))
    assert sequences[0, :, 0].tolist() == [[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]


def test_sequences_do_not_depend_on_the_layout_of_the_map():
    x = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2)
    assert torch.equal(CrossRoutes().scatter(x), CrossRoutes().scatter(x.contiguous()))


def test_tables_are_made_once_for_each_size_and_routes_copy_and_compare():
    routes = SpiralRoutes()
    assert routes.table((9, 4)).data_ptr() == SpiralRoutes().table((9, 4)).data_ptr()
    for same in (copy.deepcopy(routes), pickle.loads(pickle.dumps(routes))):
        assert same == routes
    assert CurveRoutes("hilbert") != CurveRoutes("zorder") and WindowRoutes(2) != WindowRoutes(3)


def test_a_table_made_in_inference_serves_training():
    with torch.inference_mode():
        table = CrossRoutes().table((3, 17))
    assert not table.is_inference() and CrossRoutes().table((3, 17)) is table


@pytest.mark.parametrize("routes", [SpiralRoutes(), CurveRoutes("hilbert", 4)], ids=str)
def test_scattering_and_gathering_compile_and_export_without_the_curve_in_the_graph(routes):
    class RoundTrip(torch.nn.Module):
        def forward(self, x):
            return routes.gather(routes.scatter(x), x.shape[2:])

    x = torch.randn(1, 2, 5, 6)
    want = RoundTrip()(x)
    compiled = torch.compile(RoundTrip(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    # Another size is another graph.
    for larger in (torch.randn(1, 2, 7, 7), torch.randn(1, 2, 9, 8)):
        assert torch.equal(compiled(larger), RoundTrip()(larger))
    program = torch.export.export(RoundTrip(), (x,))
    assert torch.equal(program.module()(x), want)
    assert len(list(program.graph.nodes)) < 50
    # Nothing of the export stays behind in the tables.
    assert torch.equal(RoundTrip()(x), want)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: CrossRoutes().orders((2, 2, 2)), "spatial_dims=2"),
        (lambda: SpiralRoutes().orders((2, 2, 2)), "SpiralRoutes walks maps of two sizes"),
        (lambda: CurveRoutes("peano"), "'peano'; it must be one of raster"),
        (lambda: CurveRoutes("hilbert", 3), "num_routes is 3; it must be 2, 4 or 8"),
        (lambda: WindowRoutes(0), "window is 0"),
        (lambda: SelectedRoutes(CrossRoutes(), (1, 4)), "indices is (1, 4); it must hold numbers from 0 to 3"),
        (lambda: SelectedRoutes(CrossRoutes(), ()), "indices is ()"),
        (lambda: TriOrientedRoutes(4).orders((3, 3, 3)), "27 voxels"),
        (lambda: GivenRoutes((2, 2), ()), "at least one route"),
        (lambda: GivenRoutes((2, 2), ((0, 1, 1, 2),)), "each at most once"),
        (lambda: GivenRoutes((2, 2), ((0, 1, 2, 4),)), "positions 0 to 3"),
        (lambda: GivenRoutes((2, 2), ((0, 1, 2, 3),)).orders((3, 2)), "for maps of size"),
    ],
)
def test_routes_that_do_not_fit_are_refused_with_what_fits(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


def test_given_routes_are_walked_as_written_down():
    routes = GivenRoutes((1, 3), ((2, 0, 1), (1, -1, 0)))
    x = torch.tensor([[[[10.0, 11.0, 12.0]]]])
    assert routes.scatter(x)[0, :, 0].tolist() == [[12, 10, 11], [11, 0, 10]]
