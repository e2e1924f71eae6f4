"""The counted operations of every op: the stated formulas, and for matrix products what PyTorch itself counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vssm.ops import (
    causal_conv1d,
    cross_selective_scan,
    fvcore_handles,
    local_bidirectional_scan,
    nc_ssd,
    selective_scan,
    ssd,
    use_portable,
)
from vssm.ops.flops import FORMULAS
from vssm.ops.nc_ssd import portable as nc_ssd_portable
from vssm.ops.ssd import portable as ssd_portable

B, D, L, N, K = 2, 6, 37, 4, 3
H, P, G = 6, 5, 2


def counted(function, *tensors):
    """Operations of the forward pass, and of the backward pass alone."""
    tensors = [t.requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def scan_tensors():
    u, delta, z = (torch.rand(B, D, L) for _ in range(3))
    return u, delta, -torch.rand(D, N), torch.rand(B, 2, N, L), torch.rand(B, 2, N, L), torch.rand(D), z


def head_tensors():
    x, dt = torch.rand(B, L, H, P), torch.rand(B, L, H)
    return x, dt, -torch.rand(H), torch.rand(B, L, G, N), torch.rand(B, L, G, N)


@pytest.mark.parametrize("scan,per_state", [(selective_scan, 9), (local_bidirectional_scan, 12)])
def test_scans_count_a_fixed_number_per_state_and_one_each_for_skip_and_gate(scan, per_state):
    *inputs, skip, gate = scan_tensors()
    plain, element = per_state * B * L * D * N, B * L * D
    assert counted(scan, *inputs) == (plain, 2 * plain)
    assert counted(scan, *inputs, skip) == (plain + element, 2 * (plain + element))
    assert counted(scan, *inputs, skip, gate) == (plain + 2 * element, 2 * (plain + 2 * element))


def test_a_scan_along_routes_counts_the_scans_and_their_step_sizes():
    order, rank = torch.arange(L, dtype=torch.int32).repeat(3, 1), 2
    x, rows, weight = torch.rand(B, L, D), torch.rand(B, L, 3, rank + 2 * N), torch.rand(3, D, rank)

    def scan(*tensors):
        return cross_selective_scan(*tensors[:4], order, *tensors[4:])

    forward = B * 3 * L * D * (9 * N + 2 * rank)
    assert counted(scan, x, rows, weight, -torch.rand(3, D, N)) == (forward, 2 * forward)
    forward += B * 3 * L * D
    assert counted(scan, x, rows, weight, -torch.rand(3, D, N), torch.rand(3, D)) == (forward, 2 * forward)


def test_a_causal_convolution_counts_two_per_tap():
    forward = 2 * B * D * L * K
    assert counted(causal_conv1d, torch.rand(B, D, L), torch.rand(D, K), torch.rand(D)) == (forward, 2 * forward)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunk_size", [8, 64])
def test_the_scan_of_mamba_2_counts_the_matrix_products_of_its_portable_form(chunk_size, gated):
    inputs = head_tensors()
    z = torch.rand(B, L, H, P) if gated else None
    settings = None, z, None, None, True, 0.0, math.inf, chunk_size
    with FlopCounterMode(display=False) as forward:
        ssd_portable.ssd_forward(*inputs, *settings)
    with FlopCounterMode(display=False) as backward:
        ssd_portable.ssd_backward(torch.rand(B, L, H, P), None, *inputs, *settings)
    assert forward.get_total_flops() > 0
    want = forward.get_total_flops(), backward.get_total_flops()
    assert counted(lambda *t: ssd(*t, z=z, chunk_size=chunk_size, dt_softplus=True), *inputs) == want


def test_the_non_causal_scan_counts_its_matrix_products():
    inputs = head_tensors()
    with FlopCounterMode(display=False) as forward:
        nc_ssd_portable.nc_ssd_forward(*inputs, None, None, True)
    with FlopCounterMode(display=False) as backward:
        nc_ssd_portable.nc_ssd_backward(torch.rand(B, L, H, P), *inputs, None, None, True)
    want = forward.get_total_flops(), backward.get_total_flops()
    assert want == (4 * B * L * H * P * N, 10 * B * L * H * P * N)
    assert counted(nc_ssd, *inputs) == want


def test_the_count_does_not_depend_on_the_kernel():
    native = counted(selective_scan, *scan_tensors()), counted(ssd, *head_tensors())
    with use_portable():
        assert (counted(selective_scan, *scan_tensors()), counted(ssd, *head_tensors())) == native


def test_every_op_of_the_package_has_a_formula():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vssm::")}
    assert {name.split(".")[0] for name in registered} == FORMULAS.keys()


def test_fvcore_counts_scans_in_full_and_multiply_adds_as_one():
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed; pip install fvcore")
    *inputs, skip, gate = scan_tensors()

    class Model(torch.nn.Module):
        def forward(self, u, weight):
            u = causal_conv1d(u, weight)
            look = local_bidirectional_scan(u, *inputs[1:])
            y = ssd(u.transpose(1, 2).unsqueeze(2), inputs[1].mean(1)[..., None], -torch.ones(1), *states)
            z = nc_ssd(u.transpose(1, 2).unsqueeze(2), inputs[1].mean(1)[..., None], torch.ones(1), *states)
            return selective_scan(u, *inputs[1:], skip, gate) + look + (y + z).squeeze(2).transpose(1, 2)

    states = torch.rand(B, L, 1, N), torch.rand(B, L, 1, N)
    analysis = fvcore.FlopCountAnalysis(Model(), (inputs[0], torch.rand(D, K))).set_op_handle(**fvcore_handles())
    analysis.unsupported_ops_warnings(False)
    counts = {name: count for name, count in analysis.by_operator().items() if name in FORMULAS}
    products = FORMULAS["ssd_forward"]((B, L, 1, D), None, None, (B, L, 1, N), None, 64)
    assert counts == {
        "selective_scan_forward": 9 * B * L * D * N + 2 * B * L * D,
        "local_bidirectional_scan_forward": 12 * B * L * D * N,
        "causal_conv1d_forward": B * D * L * K,
        "ssd_forward": products // 2,
        "nc_ssd_forward": 2 * B * L * D * N,
    }
