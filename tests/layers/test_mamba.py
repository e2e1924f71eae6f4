"""The Mamba mixer: official outputs and initialisation, causality, gradients, precision."""

from pathlib import Path

import pytest
import torch
from gradients import assert_reference_gradients
from mixers import error_with_official_weights
from tolerances import relative_rms

from vssm.layers.mamba import Mamba

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba1_mixer.json"


@pytest.mark.parametrize("reference", [False, True])
def test_official_weights_give_the_official_output(reference):
    assert error_with_official_weights(Mamba(d_model=32, d_state=8), GOLDEN, reference) < 1e-5


def test_initialisation_is_that_of_mamba_ssm():
    torch.manual_seed(0)
    mixer = Mamba(d_model=64, d_state=16)
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
    assert torch.equal(mixer.D, torch.ones(128))
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    # Log-uniform: the mean of log dt is the middle of the range.
    assert abs(dt.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()) < 0.35
    # dt_rank is ceil(64 / 16) = 4, so weights are uniform in +-1/2.
    assert mixer.dt_proj.weight.shape == (128, 4)
    assert 0.45 < mixer.dt_proj.weight.abs().max() <= 0.5


def test_parameters_have_the_official_names():
    assert {name for name, _ in Mamba(8).named_parameters()} == {
        "A_log",
        "D",
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "x_proj.weight",
        "dt_proj.weight",
        "dt_proj.bias",
        "out_proj.weight",
    }


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 2), (2, 65)])
def test_output_has_the_shape_of_the_input(batch, length):
    out = Mamba(12, d_state=3, d_conv=3, expand=3, dt_rank=5)(torch.randn(batch, length, 12))
    assert out.shape == (batch, length, 12)


def test_an_empty_batch_gives_an_empty_batch():
    assert Mamba(8)(torch.randn(0, 5, 8)).shape == (0, 5, 8)


def test_later_tokens_do_not_change_earlier_outputs():
    mixer, x = Mamba(8), torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 12:] += 1.0
    with torch.no_grad():
        before, after = mixer(x), mixer(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_every_parameter_gets_the_reference_gradient():
    assert_reference_gradients(Mamba(8, d_state=4), torch.randn(2, 33, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_stays_finite_where_the_scan_leaves_the_range_of_float16(dtype):
    mixer = Mamba(8, d_state=4)
    with torch.no_grad():
        # A close to 0 makes the state a running sum; a constant input makes the terms of the sum alike.
        mixer.A_log.fill_(-16.0)
        mixer.dt_proj.bias.fill_(2.0)
        mixer.in_proj.weight.fill_(0.5)
        mixer.conv1d.weight.fill_(0.25)
        mixer.x_proj.weight.fill_(0.3)
        mixer.out_proj.weight.zero_()[:, 0] = 1e-3
        x = torch.ones(1, 16384, 8)
        wanted = mixer(x)
        with torch.autocast("cpu", dtype=dtype):
            out = mixer(x)
    scan_out = wanted[0, -1, 0] / 1e-3
    assert scan_out > torch.finfo(torch.float16).max
    assert out.dtype == torch.float32
    assert relative_rms(out, wanted) < 0.05


def test_half_precision_parameters_work():
    mixer = Mamba(8).bfloat16()
    out = mixer(torch.randn(1, 9, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_compiles_without_graph_breaks():
    mixer, x = Mamba(8), torch.randn(2, 17, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), mixer(x), atol=1e-6)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(d_model=0), "d_model"),
        (dict(d_model=8, d_state=0), "d_state"),
        (dict(d_model=8, d_conv=0), "d_conv"),
        (dict(d_model=8, expand=0), "expand"),
        (dict(d_model=8, dt_rank=0), "dt_rank"),
        (dict(d_model=8, dt_rank="full"), "dt_rank"),
    ],
)
def test_impossible_sizes_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        Mamba(**arguments)


@pytest.mark.parametrize("shape", [(4, 8), (1, 8, 4), (1, 2, 4, 8)])
def test_an_input_that_is_not_batch_length_channels_is_refused(shape):
    with pytest.raises(ValueError, match="d_model = 8"):
        Mamba(8)(torch.randn(shape))
