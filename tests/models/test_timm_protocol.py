"""What timm promises of a backbone, on every name vssm registers, at small depths and widths."""

import copy
import math
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import vssm.models  # noqa: F401

NAMES = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vssm.")]
DIMS = (16, 24, 32, 48)
SMALL = {"depths": (1, 1, 2, 1), "dims": DIMS, "drop_path_rate": 0.0}

every_name = pytest.mark.parametrize("name", NAMES)


def create(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_published_names_are_registered():
    sizes = [f"{family}_{size}" for family in ("vmamba", "vmambav0") for size in ("tiny", "small", "base")]
    assert set(sizes) <= set(NAMES)


@every_name
@pytest.mark.parametrize(("num_classes", "in_chans"), [(1000, 3), (7, 1), (2, 5)])
def test_any_number_of_classes_and_channels(name, num_classes, in_chans):
    model = create(name, num_classes=num_classes, in_chans=in_chans)
    assert model.num_classes == num_classes
    assert model(images(2, in_chans, 32, 32)).shape == (2, num_classes)


@every_name
@pytest.mark.parametrize(("pool", "width"), [("avg", 48), ("max", 48), ("avgmax", 48), ("catavgmax", 96)])
def test_any_pooling(name, pool, width):
    model = create(name, global_pool=pool, num_classes=3)
    assert model(images(1, 3, 64, 32)).shape == (1, 3)
    assert model.head_hidden_size == width
    assert create(name, global_pool=pool, num_classes=0)(images(1, 3, 64, 32)).shape == (1, width)
    assert create(name, global_pool="", num_classes=0)(images(1, 3, 64, 32)).shape == (1, 48, 2, 1)


@every_name
def test_forward_is_features_then_head(name):
    model, x = create(name, num_classes=5), images(2, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 3)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pre_logits), model(x))


@every_name
def test_the_classifier_can_be_reset_and_removed(name):
    model, x = create(name), images(1, 3, 64, 64)
    features = model.forward_features(x)
    model.reset_classifier(9)
    assert model(x).shape == (1, 9) and model.num_classes == 9 and model.get_classifier().out_features == 9
    model.reset_classifier(4, "max")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.amax((2, 3)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), torch.nn.Identity)


@every_name
def test_resetting_the_classifier_keeps_dtype_mode_and_dropout(name):
    model = create(name, drop_rate=0.4).double().train()
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.float64
    assert model.head.training and model.head.drop.p == 0.4


@every_name
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,), (-1,), (-3, -1), (3, 0), 2])
def test_features_only_gives_the_chosen_stages_in_order(name, out_indices):
    x = images(1, 3, 64, 96)
    everything = create(name).forward_intermediates(x, intermediates_only=True)
    model = create(name, features_only=True, out_indices=out_indices)
    wanted = range(4 - out_indices, 4) if isinstance(out_indices, int) else out_indices
    maps = model(x)
    assert model.feature_info.channels() == [DIMS[i] for i in wanted] == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in wanted]
    for i, got in zip(wanted, maps, strict=True):
        torch.testing.assert_close(got, everything[i])


@every_name
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_every_feature_extractor_of_timm_gives_the_same_nchw_maps(name, feature_cls):
    x = images(1, 3, 64, 96)
    model = create(name, features_only=True, feature_cls=feature_cls)
    maps = model(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    for got, want in zip(maps, create(name).forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(got, want)


@every_name
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (100, 37), (64, 61)])
def test_any_size_from_32_up_without_resizing(name, size):
    model = create(name)
    final, maps = model.forward_intermediates(images(1, 3, *size))
    for info, got in zip(model.feature_info, maps, strict=True):
        assert got.shape[:2] == (1, info["num_chs"])
        for pixels, cells in zip(size, got.shape[2:], strict=True):
            assert math.floor(pixels / info["reduction"]) <= cells <= math.ceil(pixels / info["reduction"])
    assert torch.isfinite(model.forward_head(final)).all()


@every_name
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


@every_name
def test_intermediates_take_every_argument_of_timm(name):
    model, x = create(name), images(1, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and len(maps) == 4
    only = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(only, maps[2:], strict=True)] == [True, True]
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[3], final) and torch.equal(normed[2], maps[2])
    last = model.forward_intermediates(x, indices=[1], output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last[0], maps[1].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@every_name
def test_stopping_early_leaves_out_the_later_stages(name):
    model, x = create(name), images(1, 3, 64, 96)
    calls = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: calls.append(module))
    final, maps = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert len(calls) == 2 and torch.equal(final, maps[1])


@every_name
def test_pruning_keeps_the_chosen_stages_and_what_leads_there(name):
    model, x = create(name), images(1, 3, 64, 96)
    want = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2 and model.num_features == DIMS[1] and model.num_classes == 0
    assert torch.equal(model(x), want)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


@every_name
def test_every_parameter_gets_a_finite_gradient(name):
    model = create(name, num_classes=42).train()
    model(images(2, 3, 64, 64)).square().mean().backward()
    bad = [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert bad == []


@every_name
def test_gradient_checkpointing_changes_neither_output_nor_gradients(name):
    x, results = images(1, 3, 48, 32), []
    for enable in (False, True):
        model = create(name, num_classes=3).train()
        model.set_grad_checkpointing(enable)
        out = model(x)
        out.sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


@every_name
def test_stochastic_depth_grows_linearly_over_all_blocks(name):
    model = create(name, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@every_name
def test_dropout_sits_before_the_classifier(name):
    assert create(name, drop_rate=0.25).head.drop.p == 0.25


@every_name
def test_scan_parameters_and_biases_are_exempt_from_weight_decay(name):
    model = create(name)
    exempt = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert exempt <= parameters.keys()
    leaves = ("A_logs", "Ds", "dt_projs_bias")
    assert exempt == {key for key in parameters if key.endswith(leaves)} and len(exempt) == 3 * 5
    decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt)[1]["params"]
    names = {key for key, p in parameters.items() if any(p is q for q in decayed)}
    assert names == {key for key in parameters if key.endswith("weight") and parameters[key].ndim > 1}


@every_name
def test_layer_decay_gives_earlier_blocks_smaller_rates(name):
    model = create(name)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    path = [
        model.stem.conv1.weight,
        model.stages[0].blocks[0].mixer.in_proj.weight,
        model.stages[1].blocks[0].mixer.in_proj.weight,
        model.stages[2].blocks[0].mixer.in_proj.weight,
        model.stages[2].blocks[1].mixer.in_proj.weight,
        model.stages[3].blocks[0].mixer.in_proj.weight,
        model.head.fc.weight,
    ]
    scales = [scale[id(p)] for p in path]
    assert scales == sorted(set(scales)) and scales[-1] == 1.0
    assert len(scale) == len(list(model.parameters()))


@every_name
def test_coarse_groups_are_stem_stages_and_head(name):
    model = create(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert groups["stem.conv1.weight"] == 0
    assert groups["stages.2.blocks.0.norm1.weight"] == groups["stages.2.blocks.1.norm1.weight"] == 3
    assert groups["head.fc.weight"] == groups["norm.weight"] == 5


@every_name
def test_the_configuration_names_real_layers_and_published_weights(name):
    model = create(name)
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 3
    assert model.get_submodule(cfg["classifier"]).out_features == cfg["num_classes"] == 1000
    assert cfg["url"].startswith("https://") and cfg["license"] and cfg["tag"]
    assert timm.is_model_pretrained(f"{name}.{cfg['tag']}")
    assert model.forward_features(images(1, *cfg["input_size"])).shape[2:] == cfg["pool_size"]


@every_name
def test_an_unknown_argument_is_a_type_error(name):
    with pytest.raises(TypeError, match="ssm_rank_ratio"):
        create(name, ssm_rank_ratio=2.0)


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_finite_and_near_full_precision(name, dtype):
    model, x = create(name), images(2, 3, 64, 64)
    full = model.forward_features(x)
    with torch.autocast("cpu", dtype):
        low = model.forward_features(x)
    assert torch.isfinite(low).all()
    assert (low - full).norm() < 0.05 * full.norm()


@every_name
def test_double_and_bfloat16_models_run_in_their_own_type(name):
    x = images(1, 3, 32, 32)
    full = create(name)(x)
    torch.testing.assert_close(create(name).double()(x.double()), full.double(), rtol=1e-3, atol=1e-4)
    low = create(name).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and (low.float() - full).norm() < 0.1 * full.norm()


@every_name
def test_images_of_a_batch_do_not_see_each_other(name):
    model, x = create(name), images(3, 3, 40, 56)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@every_name
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_give_the_same_output(name, clone):
    model, x = create(name), images(1, 3, 32, 32)
    assert torch.equal(clone(model)(x), model(x))


@every_name
def test_own_weights_load_through_create_model(name, tmp_path):
    model, x = create(name), images(1, 3, 32, 32)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "own.pth")
    torch.manual_seed(5)
    overlay = {"file": str(tmp_path / "own.pth")}
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    assert torch.equal(again(x), model(x))


# One name per set of parts and two stages: compilation takes seconds.
COMPILED = {"depths": (1, 1), "dims": (8, 16), "num_classes": 3}


@pytest.mark.parametrize("name", ["vmamba_tiny", "vmambav0_tiny"])
def test_models_compile_to_one_graph(name):
    model, x = create(name, **COMPILED), images(1, 3, 48, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["vmamba_tiny", "vmambav0_tiny"])
def test_models_export(name):
    model, x = create(name, **COMPILED), images(1, 3, 48, 32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
