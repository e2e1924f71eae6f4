"""Hidden attention against matrices written out by the formula, and against the op it explains."""

import pytest
import timm
import torch
from torch.nn.functional import softplus

import vssm.models  # noqa: F401
from vssm.explain import hidden_attention, scan_calls
from vssm.layers.routes import CrossRoutes
from vssm.ops import cross_selective_scan, local_bidirectional_scan, nc_ssd, selective_scan, ssd

BATCH, CHANNELS, LENGTH, STATES = 2, 4, 7, 3


class Calls(torch.nn.Module):
    """A model of one scan: `function` of the image."""

    def __init__(self, function):
        super().__init__()
        self.scan = Applied(function)

    def forward(self, x):
        return self.scan(x)


class Applied(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def written_out(dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """alpha (D, L, L) of one sequence: dt (D, L), A (D, N), B and C (N, L)."""
    alpha = torch.zeros(*dt.shape, dt.shape[1], dtype=torch.float64)
    for i in range(dt.shape[1]):
        for j in range(i + 1):
            decay = torch.exp(A * dt[:, j + 1 : i + 1].sum(1, keepdim=True))
            alpha[:, i, j] = (C[:, i] * decay * B[:, j]).sum(1) * dt[:, j]
    return alpha


def test_rows_equal_the_matrix_of_the_formula_and_leave_out_skip_and_gate():
    delta, A = draw(BATCH, CHANNELS, LENGTH), -draw(CHANNELS, STATES).exp()
    B, C = draw(BATCH, STATES, LENGTH), draw(BATCH, STATES, LENGTH)
    D, z = draw(CHANNELS), draw(BATCH, CHANNELS, LENGTH)

    def scan(u):
        return selective_scan(u, delta, A, B, C, D=D, z=z, delta_softplus=True)

    got = hidden_attention(Calls(scan), draw(BATCH, CHANNELS, LENGTH), 0)
    for b in range(BATCH):
        want = written_out(softplus(delta[b]), A, B[b], C[b])
        torch.testing.assert_close(got[b], want.mean(0).float())


def test_attention_applied_to_the_input_is_the_output_of_the_scan():
    delta, A = draw(1, 1, LENGTH).exp(), -draw(1, STATES).exp()
    B, C = draw(1, STATES, LENGTH), draw(1, STATES, LENGTH)
    u = draw(1, 1, LENGTH)
    for function in (selective_scan, lambda *x: local_bidirectional_scan(*x, window=3)):
        alpha = hidden_attention(Calls(lambda x, f=function: f(x, delta, A, B, C)), u, 0)
        torch.testing.assert_close(alpha[0].double() @ u[0, 0], function(u, delta, A, B, C)[0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [lambda *x: ssd(*x, chunk_size=4), nc_ssd])
def test_heads_are_covered(op):
    dt, A = draw(1, LENGTH, 1).exp(), -draw(1).exp()
    B, C = draw(1, LENGTH, 1, STATES), draw(1, LENGTH, 1, STATES)
    x = draw(1, LENGTH, 1, 1)
    alpha = hidden_attention(Calls(lambda x: op(x, dt, A, B, C)), x, 0)
    torch.testing.assert_close(alpha[0].double() @ x[0, :, 0, 0], op(x, dt, A, B, C)[0, :, 0, 0], rtol=1e-5, atol=1e-6)


def test_routes_of_a_map_are_added_at_the_positions_they_visit():
    size, rank = (2, 3), 1
    table = CrossRoutes().table(size)
    x, dt_b_c = draw(1, 6, CHANNELS), draw(1, 6, 4, rank + 2 * STATES)
    weight, A = draw(4, CHANNELS, rank), -draw(4, CHANNELS, STATES).exp()
    got = hidden_attention(Calls(lambda x: cross_selective_scan(x, dt_b_c, weight, A, table)), x, 0)
    want = torch.zeros(6, 6, dtype=torch.float64)
    for k, route in enumerate(table.long()):
        dt, B, C = dt_b_c[0, route, k].T.split((rank, STATES, STATES))
        alpha = written_out(softplus(weight[k] @ dt), A[k], B, C).mean(0)
        want[route[:, None], route[None]] += alpha
    torch.testing.assert_close(got[0], want.float())


@pytest.fixture
def model():
    return timm.create_model("vmamba_tiny", depths=(1, 2), dims=(8, 16), num_classes=3).eval()


def test_scans_of_a_model_are_found_in_order_with_their_layers(model):
    calls = scan_calls(model, torch.randn(1, 3, 32, 48))
    assert [call.layer for call in calls] == [
        "stages.0.blocks.0.mixer.scan",
        "stages.1.blocks.0.mixer.scan",
        "stages.1.blocks.1.mixer.scan",
    ]
    assert [call.positions for call in calls] == [8 * 12, 4 * 6, 4 * 6]
    # Nothing is left behind on the model.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_chosen_rows_equal_those_of_the_whole_also_in_inference_mode(model):
    x = torch.randn(2, 3, 32, 32)
    whole = hidden_attention(model, x, "stages.1.blocks.1.mixer.scan")
    assert whole.shape == (2, 16, 16) and not whole.requires_grad
    with torch.inference_mode():
        some = hidden_attention(model, x, -1, queries=[3, 11])
    torch.testing.assert_close(some, whole[:, [3, 11]])


def test_what_does_not_exist_is_refused(model):
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="the model runs 3 scans"):
        hidden_attention(model, x, 3)
    with pytest.raises(ValueError, match=r"no scan runs in layer 'head'; scans run in stages.0.blocks.0.mixer.scan"):
        hidden_attention(model, x, "head")
    with pytest.raises(ValueError, match="query 64 must lie between 0 and 63"):
        hidden_attention(model, x, 0, queries=[64])
    with pytest.raises(ValueError, match="no scan of vssm ran in Linear"):
        scan_calls(torch.nn.Linear(3, 3), torch.zeros(1, 3))
