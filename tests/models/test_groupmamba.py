"""GroupMamba's own choices, its mixer and class block, and the official outputs on the same weights (tests/golden)."""

import pytest
import timm
import torch
from official import assert_names_convert, assert_parity, load_golden, official_state, recorded_taps
from torch import nn

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official
from vssm.models.groupmamba import BLOCK_EPS, ClassBlock, GroupMamba, GroupMixer, NormedDownsample, Stem

# Parameters of the official models, counted from their state dicts.
PARAMETERS = {"groupmamba_tiny": 23361917, "groupmamba_small": 34781555, "groupmamba_base": 57150838}
# The skip by a product magnifies rounding from block to block: 6e-8 in the weights already makes 2e-4 of the logits.
EARLY, LATE = 1e-4, 3e-3
SMALL = {"depths": (1, 1), "dims": (16, 24), "stem_dim": 8, "mlp_ratios": (2.0, 3.0)}
PLACES = {
    "patch_embed1": "stem",
    "block1.0.attn.mamba_g4": "stages.0.blocks.0.mixer.groups.3",
    "block1.0.attn": "stages.0.blocks.0.mixer",
    **{f"norm{i}": f"stages.{i}.downsample.norm0" for i in (1, 2, 3)},
    "norm4": "class_block",
}


def tolerance(tap: str) -> float:
    late = ("logits", "stage2", "stage3", "norm3", "norm4", "post_network.0")
    return LATE if tap in late else EARLY


@pytest.mark.parametrize("file", ["groupmamba_tiny", "groupmamba_base"])
def test_every_recorded_tap_equals_the_official_one(file):
    golden = load_golden(file)
    model = timm.create_model(file).eval()
    load_official(model, official_state(golden))
    tokens = []
    model.class_block.norm.register_forward_pre_hook(lambda module, args: tokens.append(args[0].flatten(1, 2)))
    got = recorded_taps(model, golden, PLACES)
    # The official block gives out the class token before its norm, in front of the unchanged positions.
    got["post_network.0"] = torch.cat([tokens[0], got["stage3"]], dim=1)
    assert_parity(got, golden, {tap: tolerance(tap) for tap in got})


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_official_size_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.05)
    hidden = [stage.blocks[0].mlp.fc1 for stage in model.stages]
    assert [layer.out_features // layer.in_features for layer in hidden] == [8, 8, 4, 4]


def test_official_names_become_ours_and_ours_stay():
    with torch.device("meta"):
        assert_names_convert(timm.create_model("groupmamba_tiny"), "groupmamba_tiny")


def small(**kwargs) -> GroupMamba:
    torch.manual_seed(0)
    return GroupMamba(**{**SMALL, "num_classes": 3, **kwargs}).eval()


def test_each_quarter_of_the_channels_is_scanned_in_one_direction():
    torch.manual_seed(0)
    mixer = GroupMixer(32).double()
    x = torch.randn(1, 4, 5, 32, dtype=torch.float64)
    changed = x.clone()
    changed[0, 2, 1] += torch.randn(32)
    rows, columns = torch.arange(4)[:, None], torch.arange(5)
    by_rows, by_columns = 5 * rows + columns, 4 * columns + rows
    # Row 2, column 1 has number 11 by rows and 6 by columns.
    reached = [by_rows >= 11, by_columns >= 6, by_rows <= 11, by_columns <= 6]
    for k, group in enumerate(mixer.groups):
        # Without its neighbours in the convolution, a change is seen only by what comes after it on the route.
        nn.init.dirac_(group.conv.weight, groups=8)
        part = slice(8 * k, 8 * k + 8)
        moved = (group(changed[..., part]) != group(x[..., part])).any(-1)[0]
        assert torch.equal(moved, reached[k])


def test_the_mixer_multiplies_normalised_input_scan_and_channel_gate():
    torch.manual_seed(0)
    mixer = GroupMixer(32).double()
    # So small that the norm after it, whose epsilon is 1e-5, does not undo it.
    nn.init.constant_(mixer.skip_scale, 1e-2)
    x = torch.randn(2, 3, 4, 32, dtype=torch.float64)
    normed = mixer.norm(x)
    scanned = torch.cat([mixer.groups[k](normed[..., 8 * k : 8 * k + 8]) for k in range(4)], dim=-1)
    gate = mixer.fc2(mixer.fc1(normed.flatten(1, 2).mean(1)).clamp(min=0)).sigmoid()
    want = mixer.proj(mixer.norm(1e-2 * scanned * normed * gate[:, None, None]))
    torch.testing.assert_close(mixer(x), want)


def test_the_class_token_is_pooled_updated_alone_and_normalised():
    model, x = small(), torch.randn(2, 3, 40, 64)
    features = model.forward_features(x)
    block, token = model.class_block, features.mean((2, 3))
    updated = token + block.norm1(block.mixer(token[:, None, None])).flatten(1)
    updated = updated + block.mlp(block.norm2(updated))
    want = nn.functional.layer_norm(updated, (24,), block.norm.weight, block.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), want)
    torch.testing.assert_close(model(x), (model.head.fc(want) + model.head_dist(want)) / 2)
    # The other positions reach the classifiers through the pooling only.
    shuffled = features.flatten(2).flip(2).view(features.shape)
    torch.testing.assert_close(model.forward_head(shuffled), model.forward_head(features))


def test_dropout_acts_on_what_the_classifiers_get():
    model, features = small(drop_rate=0.5).train(), torch.randn(50, 24, 1, 1)
    dropped = model.forward_head(features, pre_logits=True) == 0
    assert 0.4 < dropped.float().mean() < 0.6


def test_two_pooled_vectors_are_two_class_tokens():
    model, features = small(global_pool="catavgmax"), torch.randn(2, 24, 2, 3)
    want = torch.cat([model.class_block(features.mean((2, 3))), model.class_block(features.amax((2, 3)))], dim=1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), want)


def test_the_class_block_stays_with_new_classes_and_goes_with_the_pooling():
    model, x = small(), torch.randn(1, 3, 32, 32)
    block = model.class_block
    model.reset_classifier(7)
    assert model.class_block is block and model(x).shape == (1, 7)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    assert not [name for name, _ in model.named_parameters() if "class_block" in name]
    model.double().reset_classifier(2, "avg")
    assert isinstance(model.class_block, ClassBlock) and model(x.double()).shape == (1, 2)


def test_weights_of_a_whole_model_load_into_one_without_a_class_block():
    whole = timm.create_model("groupmamba_tiny", **SMALL)
    overlay = {"state_dict": {f"module.{key}": value for key, value in whole.state_dict().items()}}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 0, "global_pool": ""}
    features = timm.create_model("groupmamba_tiny", **SMALL, **options).state_dict()
    own = {key: value for key, value in whole.state_dict().items() if not key.startswith(("class_block.", "head"))}
    assert features.keys() == own.keys() and all(torch.equal(features[key], own[key]) for key in own)


def test_training_can_give_both_predictions():
    model, x = small(drop_path_rate=0.0).train(), torch.randn(2, 3, 32, 32)
    model.set_distilled_training()
    labels, teacher = model(x)
    assert labels.shape == teacher.shape == (2, 3) and not torch.equal(labels, teacher)


def test_epsilons_are_the_official_ones():
    model = small()
    parts = [module for module in model.modules() if isinstance(module, Stem | GroupMixer)]
    outside = {id(module) for part in parts for module in part.modules()}
    found = {1e-5: 0, BLOCK_EPS: 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            default = id(module) in outside or name.endswith("downsample.norm")
            assert module.eps == (1e-5 if default else BLOCK_EPS), name
            found[module.eps] += 1
    # One of the stem, one downsampling, three mixers of five; norm0, norm2 of two blocks, three of the class block.
    assert found == {1e-5: 1 + 1 + 3 * 5, 1e-6: 1 + 2 + 3}


def test_initial_weights_follow_the_official_rules():
    torch.manual_seed(0)
    model = GroupMamba(depths=(1, 1), dims=(64, 128), mlp_ratios=(4.0, 4.0))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 500:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.25), name
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            assert not module.bias.any(), name
    assert model.class_block.mixer.skip_scale.item() == 1
    for mixer in (model.stages[0].blocks[0].mixer, model.class_block.mixer):
        for group in mixer.groups:
            assert not group.scan.A_logs.any() and (group.scan.Ds == 1).all()
            assert group.scan.x_proj_weight.abs().max() <= group.scan.x_proj_weight.shape[-1] ** -0.5


def test_stem_and_downsampling_round_sizes_up():
    assert Stem(3, 8, 4)(torch.zeros(1, 3, 33, 38)).shape == (1, 8, 9, 10)
    assert NormedDownsample(3, 4)(torch.zeros(1, 3, 33, 38)).shape == (1, 4, 17, 19)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": (8, 16, 32)}, r"one entry per stage each, got \(3, 4, 9, 3\), \(8, 16, 32\) and"),
        ({"dims": (64, 126, 348, 448)}, "divisible by 4, one group for each direction, got 126"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupMamba(**arguments)


def test_weights_that_cannot_be_downloaded_are_named_with_their_pages():
    message = r"Open https://drive\.google\.com/file/d/.*vssm zoo add groupmamba_tiny\.in1k FILE"
    with pytest.raises(RuntimeError, match=message):
        timm.create_model("groupmamba_tiny", pretrained=True)
