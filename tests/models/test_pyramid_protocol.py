"""What timm promises of a hierarchical backbone, on every such name of vssm, at small depths and widths."""

import math

import pytest
import timm
import torch
from families import PYRAMIDS, SEQUENCES, classifiers, create, family, images, num_features
from timm.optim import param_groups_layer_decay

every_pyramid = pytest.mark.parametrize("name", PYRAMIDS)
every_sequence = pytest.mark.parametrize("name", SEQUENCES)
# Lists, dictionaries and hooks of timm's extractors run a model's children one after the other.
EXTRACTORS = [(name, kind) for name in SEQUENCES for kind in ("list", "dict", "hook")]
EXTRACTORS += [(name, kind) for name in PYRAMIDS for kind in ("getter", "fx")]


@every_pyramid
@pytest.mark.parametrize(("pool", "times"), [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2)])
def test_any_pooling(name, pool, times):
    channels = num_features(name)
    width = times * channels
    model = create(name, global_pool=pool, num_classes=3)
    assert model(images(1, 3, 64, 32)).shape == (1, 3)
    assert model.head_hidden_size == width
    assert create(name, global_pool=pool, num_classes=0)(images(1, 3, 64, 32)).shape == (1, width)
    assert create(name, global_pool="", num_classes=0)(images(1, 3, 64, 32)).shape == (1, channels, 2, 1)


@every_pyramid
def test_forward_is_features_then_head(name):
    model, x = create(name, num_classes=5), images(2, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 3)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    outputs = [layer(pre_logits) for layer in classifiers(model)]
    assert torch.equal(sum(outputs) / len(outputs), model(x))


@every_pyramid
def test_the_classifier_can_be_reset_and_removed(name):
    model, x = create(name), images(1, 3, 64, 64)
    features = model.forward_features(x)
    model.reset_classifier(9)
    assert model(x).shape == (1, 9) and model.num_classes == 9
    assert {layer.out_features for layer in classifiers(model)} == {9}
    model.reset_classifier(4, "max")
    pooled = family(name).refine(model, features.amax((2, 3)))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    assert model.num_classes == 0 and {type(layer) for layer in classifiers(model)} == {torch.nn.Identity}


@every_pyramid
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,), (-1,), (-3, -1), (3, 0), 2])
def test_features_only_gives_the_chosen_stages_in_order(name, out_indices):
    x = images(1, 3, 64, 96)
    everything = create(name).forward_intermediates(x, intermediates_only=True)
    model = create(name, features_only=True, out_indices=out_indices)
    wanted = range(4 - out_indices, 4) if isinstance(out_indices, int) else out_indices
    maps = model(x)
    assert model.feature_info.channels() == [family(name).dims[i] for i in wanted] == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in wanted]
    for i, got in zip(wanted, maps, strict=True):
        torch.testing.assert_close(got, everything[i])


@pytest.mark.parametrize(("name", "feature_cls"), EXTRACTORS)
def test_every_feature_extractor_of_timm_gives_the_same_nchw_maps(name, feature_cls):
    x = images(1, 3, 64, 96)
    model = create(name, features_only=True, feature_cls=feature_cls)
    maps = model(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    for got, want in zip(maps, create(name).forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(got, want)


@every_pyramid
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (100, 37), (64, 61)])
def test_any_size_from_32_up_without_resizing(name, size):
    model = create(name)
    final, maps = model.forward_intermediates(images(1, 3, *size))
    for info, got in zip(model.feature_info, maps, strict=True):
        assert got.shape[:2] == (1, info["num_chs"])
        for pixels, cells in zip(size, got.shape[2:], strict=True):
            assert math.floor(pixels / info["reduction"]) <= cells <= math.ceil(pixels / info["reduction"])
    assert torch.isfinite(model.forward_head(final)).all()


@every_pyramid
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 31, 64), r"at least 32 x 32 pixels, got 31 x 64; pad or resize to 32 x 64"),
        ((1, 1, 64, 64), r"shape \(batch, 3, height, width\), got \(1, 1, 64, 64\)"),
        ((3, 64, 64), r"shape \(batch, 3, height, width\), got \(3, 64, 64\)"),
    ],
)
def test_wrong_images_are_refused_with_what_is_needed(name, shape, message):
    model = create(name)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


@every_pyramid
def test_intermediates_take_every_argument_of_timm(name):
    model, x = create(name), images(1, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and len(maps) == 4
    only = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(only, maps[2:], strict=True)] == [True, True]
    last = model.forward_intermediates(x, indices=[1], output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last[0], maps[1].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@every_sequence
def test_the_final_norm_is_applied_to_the_last_map_alone(name):
    model, x = create(name), images(1, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[3], final) and torch.equal(normed[2], maps[2])


@every_sequence
def test_stopping_early_leaves_out_the_later_stages(name):
    model, x = create(name), images(1, 3, 64, 96)
    calls = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: calls.append(module))
    final, maps = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert len(calls) == 2 and torch.equal(final, maps[1])


@every_sequence
def test_pruning_keeps_the_chosen_stages_and_what_leads_there(name):
    model, x = create(name), images(1, 3, 64, 96)
    want = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2 and model.num_features == family(name).dims[1] and model.num_classes == 0
    assert torch.equal(model(x), want)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


@every_sequence
def test_stochastic_depth_grows_linearly_over_all_blocks(name):
    model = create(name, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(family(name).rates)


@every_sequence
def test_layer_decay_gives_earlier_blocks_smaller_rates(name):
    model = create(name)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = [block for stage in model.stages for block in stage.blocks]
    path = [next(part.parameters()) for part in (model.stem, *blocks, model.head.fc)]
    scales = [scale[id(p)] for p in path]
    assert scales == sorted(set(scales)) and scales[-1] == 1.0
    assert len(scale) == len(list(model.parameters()))


@every_sequence
def test_coarse_groups_are_stem_stages_and_head(name):
    model = create(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    number = {"stem": 0, "stages.0": 1, "stages.1": 2, "stages.2": 3, "stages.3": 4}
    for key, group in groups.items():
        assert group == number.get(key.split(".")[0], number.get(".".join(key.split(".")[:2]), 5))
