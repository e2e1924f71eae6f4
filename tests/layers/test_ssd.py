"""Mixers over the state-space dual: official outputs and initialisation, causality or its absence, gradients."""

import copy
import pickle
from pathlib import Path

import parity
import pytest
import torch
from gradients import assert_reference_gradients
from mixers import error_with_official_weights
from tolerances import relative_rms

from vssm.layers.ssd import Mamba2, NonCausalSSD

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_ARGUMENTS = ("d_model", "d_state", "headdim", "ngroups", "d_ssm", "norm_before_gate", "D_has_hdim")
MIXERS = [
    (Mamba2, dict(d_model=8, d_state=4)),
    (Mamba2, dict(d_model=8, d_state=4, headdim=2, ngroups=2, d_ssm=12, norm_before_gate=True, D_has_hdim=True)),
    (NonCausalSSD, dict(d_model=8, d_state=4)),
    (NonCausalSSD, dict(d_model=6, d_state=3, expand=3, headdim=9)),
]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ["mamba2_mixer", "mamba2_mixer_mlp"])
def test_official_weights_give_the_official_output(name, reference):
    official = parity.load(GOLDEN / f"{name}.json")["source"]["kwargs"]
    mixer = Mamba2(**{key: official[key] for key in GOLDEN_ARGUMENTS if key in official})
    assert error_with_official_weights(mixer, GOLDEN / f"{name}.json", reference) < 1e-5


def test_the_non_causal_mixer_is_its_formula():
    torch.manual_seed(0)
    mixer = NonCausalSSD(8, d_state=3, headdim=4).double()
    u = torch.randn(2, 7, 8, dtype=torch.float64)
    z, x, b, c, dt = mixer.in_proj(u).split([16, 16, 3, 3, 4], dim=2)
    x, b, c = (torch.nn.functional.silu(part) for part in (x, b, c))
    weight = torch.nn.functional.softplus(dt + mixer.dt_bias) * mixer.A_log.exp()
    x = x.unflatten(2, (4, 4))
    state = torch.einsum("blh,bln,blhp->bhnp", weight, b, x)
    y = torch.einsum("bln,bhnp->blhp", c, state) + mixer.D[:, None] * x
    want = mixer.out_proj(mixer.norm(y.flatten(2)) * z)
    assert torch.allclose(mixer(u), want, atol=1e-12)


def test_initialisation_is_that_of_mamba_ssm():
    torch.manual_seed(0)
    mixer = Mamba2(256, d_state=8, headdim=1)
    A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16
    assert 1e-3 * 0.999 <= dt.min() < 1.2e-3 and 0.8e-1 < dt.max() <= 1e-1 * 1.001
    assert torch.equal(mixer.D, torch.ones(512))


@pytest.mark.parametrize("width, headdim", [(4, 8), (32, 64), (96, 64), (125, 50), (127, 2)])
def test_heads_are_as_wide_as_the_width_allows(width, headdim):
    assert Mamba2(width, d_state=2).headdim == headdim
    assert NonCausalSSD(width, d_state=2).headdim == headdim


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 2), (2, 65), (0, 5)])
@pytest.mark.parametrize("mixer, arguments", MIXERS)
def test_output_has_the_shape_of_the_input(mixer, arguments, batch, length):
    x = torch.randn(batch, length, arguments["d_model"])
    assert mixer(**arguments)(x).shape == x.shape


def test_later_tokens_do_not_change_earlier_outputs_of_mamba2():
    mixer, x = Mamba2(8, d_state=4), torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 12:] += 1.0
    with torch.no_grad():
        before, after = mixer(x), mixer(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_the_order_of_the_tokens_is_of_no_account_to_the_non_causal_mixer():
    mixer, x = NonCausalSSD(8, d_state=4).double(), torch.randn(2, 20, 8, dtype=torch.float64)
    order = torch.randperm(20)
    changed = x.clone()
    changed[:, -1] += 1.0
    with torch.no_grad():
        out = mixer(x)
        assert torch.allclose(mixer(x[:, order]), out[:, order], atol=1e-10)
        assert (mixer(changed) - out)[:, 0].abs().max() > 1e-6


@pytest.mark.parametrize("mixer, arguments", MIXERS)
def test_every_parameter_gets_the_reference_gradient(mixer, arguments):
    torch.manual_seed(0)
    assert_reference_gradients(mixer(**arguments), torch.randn(2, 33, arguments["d_model"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixer, arguments", MIXERS)
def test_autocast_returns_float32_and_stays_close(mixer, arguments, dtype):
    torch.manual_seed(0)
    mixer, x = mixer(**arguments), torch.randn(2, 4096, arguments["d_model"])
    with torch.no_grad():
        want = mixer(x)
        with torch.autocast("cpu", dtype=dtype):
            out = mixer(x)
    assert out.dtype == torch.float32
    assert relative_rms(out, want) < 0.02


def test_autocast_stays_finite_where_sums_leave_the_range_of_float16():
    mixer, x = NonCausalSSD(8, d_state=4), torch.ones(1, 16384, 8)
    with torch.no_grad():
        mixer.in_proj.weight.fill_(0.5)
        mixer.dt_bias.fill_(4.0)
        with torch.autocast("cpu", dtype=torch.float16):
            assert torch.isfinite(mixer(x)).all()


@pytest.mark.parametrize("mixer, arguments", MIXERS)
def test_half_precision_parameters_copies_and_compilation_work(mixer, arguments):
    mixer, x = mixer(**arguments), torch.randn(2, 17, arguments["d_model"])
    with torch.no_grad():
        want = mixer(x)
        assert torch.equal(copy.deepcopy(mixer)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(mixer))(x), want)
        assert torch.allclose(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), want, atol=1e-6)
        half = mixer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_rms(half, want) < 0.05


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(d_model=0), "d_model is 0"),
        (dict(d_model=8, d_state=0), "d_state is 0"),
        (dict(d_model=8, expand=0), "expand is 0"),
        (dict(d_model=8, headdim=0), "headdim is 0"),
        (dict(d_model=8, headdim=5), "headdim is 5; it must divide the 16"),
        (dict(d_model=8, headdim=8, ngroups=3), "ngroups is 3; it must divide the 2 heads"),
        (dict(d_model=8, d_ssm=17), "d_ssm is 17; there are only expand"),
        (dict(d_model=8, d_ssm=0), "d_ssm is 0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(arguments, words):
    with pytest.raises(ValueError, match=words):
        Mamba2(**arguments)


@pytest.mark.parametrize("mixer", [Mamba2, NonCausalSSD])
@pytest.mark.parametrize("shape", [(4, 8), (1, 8, 4), (1, 2, 4, 8)])
def test_an_input_that_is_not_batch_length_channels_is_refused(mixer, shape):
    with pytest.raises(ValueError, match="d_model = 8"):
        mixer(8)(torch.randn(shape))
