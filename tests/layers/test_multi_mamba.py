"""Mamba along several routes: one Mamba per route with shared projections, on sequences, maps and volumes."""

import pytest
import torch
from gradients import assert_reference_gradients
from tolerances import relative_rms

from vssm.layers.mamba import Mamba
from vssm.layers.multi_mamba import MultiMamba, stack_official
from vssm.layers.routes import AtrousRoutes, BidirectionalRoutes, CrossRoutes, TriOrientedRoutes

SUFFIXES = ("", "_b", "_s", "_t")
CASES = [
    (BidirectionalRoutes(), (11,), False),
    (BidirectionalRoutes(), (3, 5), True),
    (TriOrientedRoutes(3), (12,), False),
    (TriOrientedRoutes(), (4, 3, 2), True),
    (CrossRoutes(), (3, 4), False),
]


def mamba_of_route(mixer: MultiMamba, k: int) -> Mamba:
    """A Mamba with the parameters of route k."""
    d_model, inner = mixer.in_proj.in_features, mixer.out_proj.in_features
    mamba = Mamba(d_model, mixer.scan.d_state, mixer.conv1d.kernel_size[0])
    own = slice(k * inner, (k + 1) * inner)
    mamba.load_state_dict(
        {
            "in_proj.weight": mixer.in_proj.weight,
            "out_proj.weight": mixer.out_proj.weight,
            "conv1d.weight": mixer.conv1d.weight[own],
            "conv1d.bias": mixer.conv1d.bias[own],
            "x_proj.weight": mixer.scan.x_proj_weight[k],
            "dt_proj.weight": mixer.scan.dt_projs_weight[k],
            "dt_proj.bias": mixer.scan.dt_projs_bias[k],
            "A_log": mixer.scan.A_logs[own],
            "D": mixer.scan.Ds[own],
        }
    )
    return mamba


def spread(mixer: MultiMamba) -> MultiMamba:
    """The mixer with parameters that differ from route to route."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize(("routes", "size", "mean"), CASES)
def test_the_output_is_the_sum_or_mean_of_one_mamba_per_route(routes, size, mean):
    torch.manual_seed(0)
    mixer = spread(MultiMamba(8, routes, d_state=4, mean=mean))
    x = torch.randn(2, *size, 8)
    total = torch.zeros(2, x[0, ..., 0].numel(), 8)
    with torch.no_grad():
        for k, order in enumerate(routes.orders(size)):
            order = torch.from_numpy(order.copy()).long()
            total[:, order] += mamba_of_route(mixer, k)(x.flatten(1, -2)[:, order])
        want = (total / routes.num_routes if mean else total).view(x.shape)
        torch.testing.assert_close(mixer(x), want, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_the_reference_gradient():
    torch.manual_seed(0)
    assert_reference_gradients(MultiMamba(8, TriOrientedRoutes(), d_state=4), torch.randn(2, 4, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_returns_float32_near_full_precision(dtype):
    torch.manual_seed(0)
    mixer, x = MultiMamba(8, BidirectionalRoutes(), mean=True), torch.randn(1, 65, 8)
    with torch.no_grad():
        want = mixer(x)
        with torch.autocast("cpu", dtype=dtype):
            out = mixer(x)
    assert out.dtype == torch.float32
    assert relative_rms(out, want) < 0.05


def test_every_route_starts_as_mamba_does():
    torch.manual_seed(0)
    mixer = MultiMamba(64, TriOrientedRoutes())
    bias = mixer.scan.dt_projs_bias
    assert bias.shape == (3, 128)
    dt = torch.nn.functional.softplus(bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    assert (dt.log().mean(1) - torch.tensor([1e-3, 1e-1]).log().mean()).abs().max() < 0.35
    assert torch.equal(mixer.scan.Ds, torch.ones(3 * 128))
    assert torch.allclose(mixer.scan.A_logs.exp(), torch.arange(1.0, 17.0).expand(3 * 128, 16))
    # dt_rank is ceil(64 / 16) = 4; the convolution has 4 taps and no other input.
    assert mixer.scan.dt_projs_weight.shape == (3, 128, 4)
    assert 0.45 < mixer.conv1d.weight.abs().max() <= 0.5


@pytest.mark.parametrize("routes", [BidirectionalRoutes(), TriOrientedRoutes(), CrossRoutes()])
def test_official_parameters_of_every_route_are_put_in_their_places(routes):
    mixer = spread(MultiMamba(8, routes, d_state=4))
    suffixes = SUFFIXES[: routes.num_routes]
    official = {"blocks.0.mixer.in_proj.weight": mixer.in_proj.weight, "norm.D_b": torch.ones(2)}
    official["blocks.0.mixer.out_proj.weight"] = mixer.out_proj.weight
    for k, suffix in enumerate(suffixes):
        for name, value in mamba_of_route(mixer, k).state_dict().items():
            if name == "A_log":
                official[f"blocks.0.mixer.A{suffix}_log"] = value
            elif name == "D":
                official[f"blocks.0.mixer.D{suffix}"] = value
            elif not name.startswith(("in_proj", "out_proj")):
                layer, leaf = name.split(".")
                official[f"blocks.0.mixer.{layer}{suffix}.{leaf}"] = value
    stacked = stack_official(official, suffixes)
    assert torch.equal(stacked.pop("norm.D_b"), torch.ones(2))
    own = {f"blocks.0.mixer.{name}": value for name, value in mixer.state_dict().items()}
    assert stacked.keys() == own.keys()
    assert all(torch.equal(stacked[name], own[name]) for name in own)
    assert stack_official(own, suffixes).keys() == own.keys()


def test_an_incomplete_set_keeps_its_official_names():
    official = {"A_log": torch.zeros(4, 2), "A_b_log": torch.zeros(4, 2), "D": torch.zeros(4)}
    assert stack_official(official, ("", "_b")).keys() == {"scan.A_logs", "D"}


@pytest.mark.parametrize("shape", [(8,), (4, 8), (1, 8, 4)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(batch, \*size, d_model = 8\)"):
        MultiMamba(8, BidirectionalRoutes())(torch.randn(shape))


def test_routes_that_leave_positions_out_are_refused():
    with pytest.raises(ValueError, match=r"visits 4 positions of a map of size \(4, 4\); every route must visit each"):
        MultiMamba(8, AtrousRoutes())(torch.randn(1, 4, 4, 8))
