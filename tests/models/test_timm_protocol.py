"""What timm promises of any backbone, on every name vssm registers, at small depths and widths."""

import copy
import pickle

import pytest
import timm
import torch
from families import COMPILED, NAMES, classifiers, create, create_tiny, family, images
from timm.optim import param_groups_weight_decay

every_name = pytest.mark.parametrize("name", NAMES)


def test_the_published_names_are_registered():
    sizes = [f"{family}_{size}" for family in ("vmamba", "vmambav0") for size in ("tiny", "small", "base")]
    sizes += [f"efficientvmamba_{size}" for size in ("tiny", "small", "base")]
    sizes += [f"msvmamba_{size}" for size in ("nano", "micro", "tiny")]
    sizes += [f"msvmambav3_{size}" for size in ("tiny", "small", "base")]
    sizes += [f"{family}_{size}" for family in ("groupmamba", "vssd") for size in ("tiny", "small", "base")]
    sizes += [f"vim_{size}" for size in ("tiny", "small", "base", "tiny_stride8", "small_stride8")]
    sizes += [f"lbvim_{size}" for size in ("tiny", "300", "small", "528")]
    sizes += [f"hrvmamba_{size}" for size in ("nano", "tiny", "small", "base")]
    sizes += [f"vcmamba_{size}" for size in ("small", "medium", "base")]
    assert {*sizes, "vssd_micro"} <= set(NAMES)


@every_name
@pytest.mark.parametrize(("num_classes", "in_chans"), [(1000, 3), (7, 1), (2, 5)])
def test_any_number_of_classes_and_channels(name, num_classes, in_chans):
    model = create(name, num_classes=num_classes, in_chans=in_chans)
    assert model.num_classes == num_classes
    assert model(images(2, in_chans, 32, 32)).shape == (2, num_classes)


@every_name
def test_resetting_the_classifier_keeps_dtype_mode_and_dropout(name):
    model = create(name, drop_rate=0.4).double().train()
    model.reset_classifier(3)
    assert {layer.weight.dtype for layer in classifiers(model)} == {torch.float64}
    assert model.head.training and model.head.drop.p == 0.4


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
def test_dropout_sits_before_the_classifier(name):
    assert create(name, drop_rate=0.25).head.drop.p == 0.25


@every_name
def test_scan_parameters_and_biases_are_exempt_from_weight_decay(name):
    model = create(name)
    exempt = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert exempt <= parameters.keys()
    leaves = family(name).exempt
    assert exempt == {key for key in parameters if key.split(".")[-1] in leaves}
    assert {key.split(".")[-1] for key in exempt} == set(leaves)
    decayed = {id(p) for p in param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt)[1]["params"]}
    small = {key for key, p in parameters.items() if p.ndim <= 1 or key.endswith(".bias")}
    assert {key for key, p in parameters.items() if id(p) in decayed} == parameters.keys() - exempt - small


@every_name
def test_the_configuration_names_real_layers_and_published_weights(name):
    model = create(name)
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 3
    heads = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert tuple(model.get_submodule(head) for head in heads) == classifiers(model)
    assert {head.out_features for head in classifiers(model)} == {1000} == {cfg["num_classes"]}
    assert cfg["license"] and cfg["tag"]
    # Either a file to download, or pages where a person finds it.
    assert timm.is_model_pretrained(f"{name}.{cfg['tag']}") == bool(cfg["url"])
    places = [cfg["url"]] if cfg["url"] else cfg["notes"]
    assert places and all(place.startswith("https://") for place in places)
    features = model.forward_features(images(1, *cfg["input_size"]))
    # Tokens have no map.
    assert cfg["pool_size"] == (features.shape[2:] if features.ndim == 4 else None)


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
def test_shapes_can_be_computed_on_the_meta_device(name):
    model = create(name, num_classes=3).to("meta")
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 3)


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
    overlay = {"file": str(tmp_path / "own.pth")}
    again = create(name, seed=5, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", COMPILED)
def test_models_compile_to_one_graph(name):
    model, x = create_tiny(name), images(1, 3, 48, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", COMPILED)
def test_models_export(name):
    model, x = create_tiny(name), images(1, 3, 48, 32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
