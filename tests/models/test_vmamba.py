"""VMamba's own choices: sizes of the published variants, parts of v0, initial weights."""

import pytest
import timm
import torch
from torch import nn

import vssm.models  # noqa: F401
from vssm.layers.pyramid import PatchMerging
from vssm.models.vmamba import VMamba

# Parameters of the official models, counted from their state dicts.
PARAMETERS = {
    "vmamba_tiny": 30249064,
    "vmamba_small": 50147752,
    "vmamba_base": 88557800,
    "vmamba_tiny_s2l5": 30705832,
    "vmamba_small_s1l20": 49012840,
    "vmamba_base_s1l20": 86614504,
    "vmambav0_tiny": 22893448,
    "vmambav0_small": 44417416,
    "vmambav0_base": 76254056,
}
# The published training runs; the README's base model was trained with more than its s1l20 sibling.
DROP_PATH = {"tiny": 0.2, "tiny_s2l5": 0.2, "small": 0.3, "small_s1l20": 0.3, "base": 0.6, "base_s1l20": 0.5}
# ssm_ratio and blocks of the third stage, by the authors' short name.
RELEASES = {
    "vmamba_tiny.s1l8_in1k": (1, 8),
    "vmamba_tiny_s2l5.in1k": (2, 5),
    "vmamba_small.s2l15_in1k": (2, 15),
    "vmamba_small_s1l20.in1k": (1, 20),
    "vmamba_base.s2l15_in1k": (2, 15),
    "vmamba_base_s1l20.in1k": (1, 20),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_published_size_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(DROP_PATH[name.split("_", 1)[1]])


@pytest.mark.parametrize("release", RELEASES)
def test_a_name_with_its_tag_builds_the_architecture_that_the_authors_released_under_it(release):
    with torch.device("meta"):
        model = timm.create_model(release)
    ratio, blocks = RELEASES[release]
    assert len(model.stages[2].blocks) == blocks
    assert model.stages[2].blocks[0].mixer.in_proj.out_features == ratio * model.feature_info[2]["num_chs"]


def test_every_vmamba_release_is_listed_and_no_two_share_a_file():
    names = timm.list_pretrained("vmamba_*")
    assert set(names) == set(RELEASES)
    assert len({timm.models.get_pretrained_cfg(name).url for name in names}) == len(names)


@pytest.mark.parametrize("wrong", ["vmamba_tiny.s2l5_in1k", "vmamba_small.s1l20_in1k", "vmamba_tiny_s2l5.s1l8_in1k"])
def test_a_tag_of_another_architecture_is_refused(wrong):
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model(wrong, depths=(1, 1), dims=(8, 16))


def test_v0_has_no_mlp_and_both_versions_normalise_with_the_same_epsilon():
    v0 = timm.create_model("vmambav0_tiny", depths=(1, 1), dims=(8, 16))
    v2 = timm.create_model("vmamba_tiny", depths=(1, 1), dims=(8, 16))
    assert v0.stages[0].blocks[0].mlp is None and v2.stages[0].blocks[0].mlp is not None
    for model in (v0, v2):
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        assert {m.eps for m in norms} == {1e-5} and len(norms) >= 7


def test_depths_and_dims_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"one entry per stage each, got \(1, 1\) and \(8, 16, 32\)"):
        VMamba(depths=(1, 1), dims=(8, 16, 32))


def test_patch_merging_concatenates_neighbours_down_then_right_and_pads_with_zeros():
    layer = PatchMerging(1, 4)
    layer.norm = nn.Identity()
    layer.reduction = nn.Identity()
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    merged = layer(x).permute(0, 2, 3, 1)[0]
    assert merged.tolist() == [[[1, 4, 2, 5], [3, 6, 0, 0]], [[7, 0, 8, 0], [9, 0, 0, 0]]]


def test_linear_layers_start_as_a_truncated_normal_of_002_without_bias():
    torch.manual_seed(0)
    model = timm.create_model("vmamba_tiny", depths=(1, 1), dims=(64, 128))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 2 * 4 + 1
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    # Convolutions keep PyTorch's own initialisation.
    bound = model.stages[0].blocks[0].mixer.conv.weight[0].numel() ** -0.5
    assert 0.9 * bound < model.stages[0].blocks[0].mixer.conv.weight.abs().max() <= bound
