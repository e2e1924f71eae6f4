"""MSVMamba: parity of both generations with the official code, sizes, names in checkpoints, initial weights."""

import pytest
import timm
import torch
from official import assert_parity, load_golden, meta_state, official_state, recorded_taps
from torch import nn

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official
from vssm.models.msvmamba import MSVMamba, MSVMambaV3

TOLERANCE = 1e-4
FILES = ["msvmamba_nano", "msvmamba_tiny", "msvmambav3_tiny", "msvmambav3_small", "msvmambav3_base"]
# The recorded parts of the official models -> where they are here.
PLACES = {
    "patch_embed": "stem",
    "layers.0.blocks.0.op.se": "stages.0.blocks.0.mixer.se",
    "layers.0.blocks.0.op": "stages.0.blocks.0.mixer",
    "layers.0.blocks.0.convFFN": "stages.0.blocks.0.mlp",
    **{f"downsample{i}": f"stages.{i + 1}.downsample" for i in range(3)},
    "classifier.norm": "norm",
}
# Parameters and drop path of the official models: counted from their state dicts, read in their configurations.
VARIANTS = {
    "msvmamba_nano": (6864136, 0.2),
    "msvmamba_micro": (11879272, 0.2),
    "msvmamba_tiny": (33046312, 0.2),
    "msvmambav3_tiny": (32263720, 0.2),
    "msvmambav3_small": (50216296, 0.4),
    "msvmambav3_base": (90591976, 0.5),
}


@pytest.mark.parametrize("file", FILES)
def test_logits_and_every_part_equal_the_official_ones(file):
    golden = load_golden(file)
    model = timm.create_model(golden["name"]).eval()
    load_official(model, official_state(golden))
    assert_parity(recorded_taps(model, golden, PLACES), golden, TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_published_size_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, rate = VARIANTS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(rate)


@pytest.mark.parametrize("model_class", [MSVMamba, MSVMambaV3])
def test_every_norm_has_the_official_epsilon(model_class):
    norms = [m for m in model_class(depths=(1, 1), dims=(8, 16)).modules() if isinstance(m, nn.LayerNorm)]
    assert {m.eps for m in norms} == {1e-5} and len(norms) >= 2 * 3 + 3


@pytest.mark.parametrize("model_class", [MSVMamba, MSVMambaV3])
def test_linear_layers_start_as_a_truncated_normal_and_convolutions_as_pytorch_makes_them(model_class):
    torch.manual_seed(0)
    model = model_class(depths=(1, 1), dims=(64, 128), num_classes=64)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    # Two projections and two of the gate per block, the classifier, and the first generation's merging.
    assert len(linear) == 2 * 4 + 1 + (model_class is MSVMamba)
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    block = model.stages[0].blocks[0]
    for layer in (block.mlp.fc1, block.mlp.conv, block.mixer.conv, block.mixer.half_conv):
        bound = layer.weight[0].numel() ** -0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("name", ["msvmamba_nano", "msvmambav3_base"])
def test_own_names_pass_the_conversion_unchanged(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    own = model.convert_official(meta_state(name))
    assert shapes(own) == shapes(model.convert_official(own)) == shapes(model.state_dict())


def test_linear_layers_stored_as_1x1_convolutions_are_accepted():
    state = meta_state("msvmambav3_base")
    state = {key: v[:, :, None, None] if key.endswith("_proj.weight") else v for key, v in state.items()}
    assert state["layers.0.blocks.0.op.in_proj.weight"].ndim == 4
    with torch.device("meta"):
        model = timm.create_model("msvmambav3_base")
    assert shapes(model.convert_official(state)) == shapes(model.state_dict())


def test_depths_and_dims_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"one entry per stage each, got \(1, 1\) and \(8, 16, 32\)"):
        MSVMamba(depths=(1, 1), dims=(8, 16, 32))
