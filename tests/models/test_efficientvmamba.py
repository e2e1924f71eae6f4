"""EfficientVMamba: parity with the official code, sizes of the variants, names in checkpoints, initial weights."""

import pytest
import timm
import torch
from official import assert_parity, load_golden, meta_state, official_state, recorded_taps
from torch import nn

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official
from vssm.models.efficientvmamba import ConvBlock, EfficientVMamba, ScanBlock

TOLERANCE = 1e-4
# Parameters of the official models, counted from their training logs.
PARAMETERS = {"efficientvmamba_tiny": 6493660, "efficientvmamba_small": 11273688, "efficientvmamba_base": 33717136}


# The small model's second stage is of odd size, so its atrous scan and the merging after it pad.
@pytest.mark.parametrize("file", ["efficientvmamba_tiny", "efficientvmamba_small"])
def test_logits_and_every_stage_equal_the_official_ones(file):
    golden = load_golden(file)
    model = timm.create_model(golden["name"]).eval()
    wrapped = {f"module.module.{key}": value for key, value in official_state(golden).items()}
    load_official(model, {"state_dict": wrapped})
    assert_parity(recorded_taps(model, golden, {}), golden, TOLERANCE)


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_published_size_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.1)


def small_model(**kwargs: object) -> EfficientVMamba:
    return EfficientVMamba(depths=(1, 1, 1, 1), dims=(64, 64, 64, 64), num_classes=64, **kwargs)


def test_two_stages_scan_and_the_others_convolve():
    kinds = [type(block) for stage in small_model().stages for block in stage.blocks]
    assert kinds == [ScanBlock, ScanBlock, ConvBlock, ConvBlock]


def test_every_norm_has_the_official_epsilon():
    norms = [m for m in small_model().modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert {m.eps for m in norms} == {1e-5}
    # Stem, final norm, three mergings; input, mixer, gate and batch norm of a scan; three of a convolution.
    assert len(norms) == 1 + 1 + 3 + 2 * 4 + 2 * 3


def test_stochastic_depth_drops_the_residual_of_both_kinds_of_blocks():
    x = torch.randn(1, 4, 4, 16)
    for block in (ScanBlock(16, 0.999999), ConvBlock(16, 0.999999)):
        torch.manual_seed(0)
        assert torch.equal(block.train()(x), x)
        assert not torch.allclose(block.eval()(x), x)


def test_linear_layers_start_as_a_truncated_normal_and_convolutions_as_pytorch_makes_them():
    torch.manual_seed(0)
    model = small_model()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    # Two projections and two of the gate per scan, three mergings, the classifier.
    assert len(linear) == 2 * 4 + 3 + 1
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    for layer in (model.stages[0].blocks[0].conv[1], model.stages[2].blocks[0].conv_pw):
        bound = layer.weight[0].numel() ** -0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Of the tensors that the golden files record."""
    return {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}


def test_own_names_pass_the_conversion_unchanged():
    with torch.device("meta"):
        model = timm.create_model("efficientvmamba_tiny")
    own = model.convert_official(meta_state("efficientvmamba_tiny"))
    assert shapes(own) == shapes(model.state_dict())
    assert model.convert_official(own).keys() == own.keys()


def test_the_deeper_third_stage_of_the_base_model_is_renamed():
    official = {}
    for key, value in meta_state("efficientvmamba_tiny").items():
        if key.startswith("layers.2.6."):
            official[key.replace("layers.2.6.", "layers.2.11.")] = value
        elif key.startswith("layers.2.1."):
            official |= {key.replace("layers.2.1.", f"layers.2.{j}."): value for j in range(1, 10)}
        elif not key.startswith("layers.2."):
            official[key] = value
    with torch.device("meta"):
        model = timm.create_model("efficientvmamba_base", dims=(48, 96, 192, 384))
    assert shapes(model.convert_official(official)) == shapes(model.state_dict())


def test_depths_and_dims_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"one entry per stage each, got \(1, 1\) and \(8, 16, 32\)"):
        EfficientVMamba(depths=(1, 1), dims=(8, 16, 32))
