"""RouteScan and SS2D against a plain loop over the recurrence, and their initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F

from vssm.layers.route_scan import RouteScan
from vssm.layers.routes import CrossRoutes
from vssm.layers.ss2d import SS2D


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """`module` in float64 with parameters that all matter and all differ."""
    generator = torch.Generator().manual_seed(0)
    for p in module.double().parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def scan_of_one_sequence(layer: RouteScan, k: int, x: torch.Tensor) -> torch.Tensor:
    """The recurrence of one route, step by step, on a sequence (D, L)."""
    channels = x.shape[0]
    a = -layer.A_logs.view(-1, channels, layer.d_state)[k].exp()
    skip = layer.Ds.view(-1, channels)[k]
    h = torch.zeros(channels, layer.d_state, dtype=x.dtype)
    out = []
    for step in x.T:
        t, b, c = (layer.x_proj_weight[k] @ step).split((layer.dt_rank, layer.d_state, layer.d_state))
        dt = F.softplus(layer.dt_projs_weight[k] @ t + layer.dt_projs_bias[k])[:, None]
        h = (dt * a).exp() * h + dt * b * step[:, None]
        out.append(h @ c + skip * step)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize(("d_state", "dt_rank"), [(1, 1), (4, 3)])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_every_route_is_scanned_with_its_own_weights(d_state, dt_rank, separate):
    layer = randomised(RouteScan(5, 3, d_state, dt_rank))
    x = torch.randn(2, 7, 3, 5, dtype=torch.float64)
    order = torch.stack([torch.randperm(7) for _ in range(3)])
    got = layer(x if separate else x[:, :, 0], order.int())
    want = torch.zeros_like(x)
    for item in range(2):
        for k in range(3):
            walk = x[item, order[k], k if separate else 0]
            want[item, order[k], k] = scan_of_one_sequence(layer, k, walk.T).T
    torch.testing.assert_close(got, want if separate else want.sum(2))


@pytest.mark.parametrize("gate", [False, True])
def test_ss2d_projects_convolves_scans_normalises_and_gates(gate):
    layer = randomised(SS2D(6, CrossRoutes(), d_state=2, expand=1.5, gate=gate, conv_bias=gate))
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    inner = layer.in_proj(x)
    inner, z = inner.chunk(2, dim=-1) if gate else (inner, None)
    m = F.silu(layer.conv(inner.permute(0, 3, 1, 2)))[0]
    total = torch.zeros_like(m)
    rows, columns = m.flatten(1), m.mT.flatten(1)
    for k, walk in enumerate((rows, columns, rows.flip(1), columns.flip(1))):
        y = scan_of_one_sequence(layer.scan, k, walk)
        y = y.flip(1) if k >= 2 else y
        total += y.view(9, 3, 4) if k % 2 == 0 else y.view(9, 4, 3).mT
    want = F.layer_norm(total.permute(1, 2, 0), (9,), layer.norm.weight, layer.norm.bias, eps=1e-5)
    want = want * F.silu(z[0]) if gate else want
    torch.testing.assert_close(layer(x)[0], want @ layer.out_proj.weight.T)


def test_ss2d_scans_a_volume_along_its_three_axes_there_and_back():
    layer = randomised(SS2D(4, CrossRoutes(3), d_state=2, spatial_dims=3, gate=True, conv_bias=True))
    x = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    inner, z = layer.in_proj(x).chunk(2, dim=-1)
    m = F.silu(layer.conv(inner.permute(0, 4, 1, 2, 3)))[0]
    total = torch.zeros_like(m)
    for k in range(6):
        # Cyclic orders of the axes, the last one the fastest; then all of them backwards.
        axes = [1 + (axis + k) % 3 for axis in range(3)]
        walk = m.permute(0, *axes)
        sequence = walk.flatten(1).flip(1) if k >= 3 else walk.flatten(1)
        y = scan_of_one_sequence(layer.scan, k, sequence)
        y = (y.flip(1) if k >= 3 else y).view(walk.shape)
        total += y.permute(0, *(1 + axes.index(axis) for axis in (1, 2, 3)))
    want = F.layer_norm(total.permute(1, 2, 3, 0), (8,), layer.norm.weight, layer.norm.bias, eps=1e-5) * F.silu(z[0])
    torch.testing.assert_close(layer(x)[0], want @ layer.out_proj.weight.T)


def test_ss2d_refuses_other_dimensions():
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
        SS2D(4, CrossRoutes(), spatial_dims=1)


def test_the_step_rank_follows_the_model_width_and_not_the_inner_width():
    assert SS2D(33, CrossRoutes(), expand=2.0).scan.dt_rank == 3
    assert SS2D(33, CrossRoutes(), dt_rank=5).scan.dt_rank == 5


def test_an_even_convolution_is_refused():
    with pytest.raises(ValueError, match=r"d_conv must be odd.*got 4"):
        SS2D(4, CrossRoutes(), d_conv=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_sums_too_large_for_half_precision_reach_the_norm(dtype):
    layer = SS2D(8, CrossRoutes())
    layer.scan.Ds.data.fill_(1e6)
    seen = []
    layer.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype):
        out = layer(torch.randn(1, 5, 5, 8))
    assert seen[0].dtype == torch.float32 and seen[0].abs().max() > torch.finfo(torch.float16).max
    assert torch.isfinite(out).all()


def test_the_initial_recurrence_is_that_of_the_paper():
    torch.manual_seed(0)
    layer = RouteScan(256, 4, 16, 9)
    torch.testing.assert_close(layer.A_logs.exp(), torch.arange(1.0, 17.0).expand(1024, 16))
    assert torch.equal(layer.Ds, torch.ones(1024))
    dt = F.softplus(layer.dt_projs_bias).log()
    low, high = math.log(1e-3), math.log(0.1)
    assert dt.min() > low - 1e-3 and dt.max() < high + 1e-3
    # Log-uniform: mean and standard deviation of a uniform distribution of log dt.
    assert dt.mean().item() == pytest.approx((low + high) / 2, abs=0.15)
    assert dt.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.1)
    for weight, bound in ((layer.dt_projs_weight, 9**-0.5), (layer.x_proj_weight, 256**-0.5)):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
