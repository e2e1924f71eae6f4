"""VSSD's own choices, its token mixer, and the official outputs on the same weights (tests/golden)."""

import pytest
import timm
import torch
from official import assert_names_convert, assert_parity, load_golden, official_state, recorded_taps
from torch import nn
from torch.nn.functional import silu, softplus

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official
from vssm.layers.nc_ssd2d import NCSSD2D
from vssm.models.vssd import VSSD, MapAttention, Merging, Stem

# Parameters of the official models, counted from their state dicts.
PARAMETERS = {"vssd_micro": 13512964, "vssd_tiny": 24270724, "vssd_small": 40075650, "vssd_base": 88823151}
DROP_PATH = {"vssd_micro": 0.2, "vssd_tiny": 0.2, "vssd_small": 0.4, "vssd_base": 0.6}
TOLERANCE = 5e-4


def places(golden: dict) -> dict[str, str]:
    """Our submodules for the taps other than the stages and the logits."""
    found = {}
    for tap in golden["outputs"]:
        if tap.startswith("layers."):
            found[tap] = tap.replace("layers.", "stages.").replace(".attn", ".mixer")
        elif tap.startswith("downsample"):
            found[tap] = f"stages.{int(tap[-1]) + 1}.downsample"
    return {"patch_embed": "stem", "norm": "norm", **found}


@pytest.mark.parametrize("file", ["vssd_micro", "vssd_tiny", "vssd_base"])
def test_every_recorded_tap_equals_the_official_one(file):
    golden = load_golden(file)
    model = timm.create_model(file).eval()
    load_official(model, official_state(golden))
    assert_parity(recorded_taps(model, golden, places(golden)), golden, TOLERANCE)


@pytest.mark.parametrize("name", DROP_PATH)
def test_variants_have_the_official_size_heads_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(DROP_PATH[name])
    width = 48 if name == "vssd_micro" else 64
    for stage in model.stages[:-1]:
        mixer = stage.blocks[0].mixer
        assert mixer.out_proj.in_features // len(mixer.A_log) == width
        assert mixer.split[1] == width
    assert all(isinstance(block.mixer, MapAttention) for block in model.stages[-1].blocks)


def test_small_is_tiny_with_the_depths_of_base():
    with torch.device("meta"):
        small, tiny, base = (timm.create_model(f"vssd_{size}") for size in ("small", "tiny", "base"))
    assert (
        [len(stage.blocks) for stage in small.stages] == [len(stage.blocks) for stage in base.stages] == [3, 4, 21, 5]
    )
    blocks = {name: p.shape for name, p in tiny.named_parameters() if ".blocks.0." in name}
    assert blocks.items() <= {name: p.shape for name, p in small.named_parameters()}.items()


def test_each_release_has_a_tag_and_a_file_of_its_own():
    tags = {name: timm.get_pretrained_cfg(name) for name in timm.list_pretrained("vssd_*")}
    sizes = ("tiny", "small", "base")
    both = {f"vssd_{size}.{tag}" for size in sizes for tag in ("in1k", "mesa_in1k")}
    assert tags.keys() == both | {"vssd_micro.in1k"}
    assert len({cfg.url for cfg in tags.values()}) == len(tags)
    assert all(("mesa" in cfg.url) == ("mesa" in name) for name, cfg in tags.items())
    assert timm.get_pretrained_cfg("vssd_tiny").tag == "in1k"


def test_official_names_become_ours_and_ours_stay():
    with torch.device("meta"):
        assert_names_convert(timm.create_model("vssd_micro"), "vssd_micro")


@pytest.fixture
def mixer() -> NCSSD2D:
    torch.manual_seed(0)
    return NCSSD2D(d_model=6, num_heads=3, d_state=5).double()


def test_the_mixer_is_attention_without_softmax_between_all_positions(mixer):
    u = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    z, xbc, dt = mixer.in_proj(u).split([12, 22, 3], dim=-1)
    weight, bias = mixer.conv.weight, mixer.conv.bias
    xbc = silu(nn.functional.conv2d(xbc.permute(0, 3, 1, 2), weight, bias, padding=1, groups=22)).permute(0, 2, 3, 1)
    x, b, c = xbc.flatten(1, 2).split([12, 5, 5], dim=-1)
    x = x.unflatten(-1, (3, 4))
    steps = softplus(dt.flatten(1, 2) + mixer.dt_bias) * mixer.A_log.exp()
    scores = torch.einsum("bin,bjn->bij", c, b)
    y = torch.einsum("bij,bjh,bjhp->bihp", scores, steps, x) + mixer.D[:, None] * x
    y = nn.functional.layer_norm(y.flatten(2), (12,), mixer.norm.weight, mixer.norm.bias, 1e-5)
    torch.testing.assert_close(mixer(u), mixer.out_proj(y.view(z.shape) * z))


def test_the_scan_starts_as_in_mamba2():
    torch.manual_seed(0)
    mixer = NCSSD2D(d_model=1000, num_heads=1000, d_state=2)
    decay, step = mixer.A_log.exp(), softplus(mixer.dt_bias)
    assert 1 <= decay.min() < 1.2 and 15.8 < decay.max() <= 16 and decay.mean().item() == pytest.approx(8.5, rel=0.05)
    assert 1e-3 * 0.999 <= step.min() < 1.1e-3 and 0.09 < step.max() <= 0.1 * 1.001
    assert step.log().mean().item() == pytest.approx(torch.tensor([1e-3, 0.1]).log().mean().item(), abs=0.1)
    assert torch.equal(mixer.D, torch.ones(1000))


def test_linear_layers_start_as_a_truncated_normal_and_the_scan_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("vssd_tiny", depths=(1, 1), dims=(64, 128), num_heads=(2, 4))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 2 * 4 + 1
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    mixer = model.stages[0].blocks[0].mixer
    assert mixer.A_log.exp().min() >= 1 and softplus(mixer.dt_bias).max() < 0.101


def test_every_norm_has_the_official_epsilon():
    model = timm.create_model("vssd_micro", depths=(1, 1, 1, 1))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-5} and len(norms) == 5 + 3 + 4 * 2 + 3 + 1


def test_stem_and_merging_round_sizes_up():
    x = torch.zeros(1, 3, 33, 38)
    assert Stem(3, 8)(x).shape == (1, 8, 9, 10)
    assert Merging(3, 4)(x).shape == (1, 4, 17, 19)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": (2, 4)}, r"one entry per stage each, got \(2, 4, 8, 4\), \(64, 128, 256, 512\) and \(2, 4\)"),
        ({"dims": (64, 128, 256, 500)}, "must be a multiple of its num_heads, got 500 and 16"),
        ({"num_heads": (3, 4, 8, 16)}, "must divide the 128 inner channels, got 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VSSD(**arguments)
