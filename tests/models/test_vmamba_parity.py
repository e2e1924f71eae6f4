"""VMamba against outputs of the official code on the same weights (tests/golden, format in parity.py)."""

import argparse
from dataclasses import replace
from pathlib import Path

import parity
import pytest
import serving
import timm
import torch
from official import assert_names_convert, assert_parity, load_golden, meta_state, official_state, stages_and_logits
from timm.models import _registry

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official

TOLERANCE = 1e-4
# Odd sizes cover the rounding of both stems and the padding of v0's patch merging.
FILES = ["vmamba_tiny", "vmamba_small_odd", "vmamba_base", "vmambav0_tiny_odd"]


def assert_official(model, golden: dict) -> None:
    assert_parity(stages_and_logits(model.eval(), golden), golden, TOLERANCE)


@pytest.mark.parametrize("file", FILES)
def test_logits_and_every_stage_equal_the_official_ones(file):
    golden = load_golden(file)
    model = timm.create_model(golden["name"])
    load_official(model, official_state(golden))
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert_official(model, golden)


@pytest.fixture(scope="module")
def tiny() -> dict:
    return load_golden("vmamba_tiny")


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("official") / "vssm1_tiny.pth"
    checkpoint = {"model": official_state(tiny), "optimizer": {"state": {}}, "config": argparse.Namespace(NAME="vssm")}
    torch.save(checkpoint, path)
    return str(path)


def test_create_model_reads_an_official_file_with_the_same_result(tiny, tiny_file):
    model = timm.create_model("vmamba_tiny", pretrained=True, pretrained_cfg_overlay={"file": tiny_file})
    assert_official(model, tiny)


def test_create_model_downloads_an_official_file_with_the_same_result(tiny, tiny_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serving.running() as server:
        cfg = replace(timm.get_pretrained_cfg("vmamba_tiny"), url=f"{server.address}/vssm1_tiny.pth")
        monkeypatch.setitem(_registry._model_pretrained_cfgs, "vmamba_tiny", cfg)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, f"vmamba_tiny.{cfg.tag}", cfg)
        # The connection breaks once on the way.
        server.files["vssm1_tiny.pth"] = Path(tiny_file).read_bytes()
        server.script.append(serving.breaks_after(10_000_000))
        model = timm.create_model("vmamba_tiny", pretrained=True)
        assert server.ranges == ["", "bytes=10000000-"]
    assert_official(model, tiny)


def test_create_model_adapts_an_official_file_to_other_channels_and_classes(tiny, tiny_file):
    overlay = {"file": tiny_file}
    model = timm.create_model("vmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5)
    state = official_state(tiny)
    gray = state["patch_embed.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.conv1.weight, gray)
    assert torch.equal(model.norm.weight, state["classifier.norm.weight"])
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 5)


def test_features_only_loads_an_official_file(tiny, tiny_file):
    overlay = {"file": tiny_file}
    model = timm.create_model("vmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    with torch.inference_mode():
        maps = model.eval()(torch.from_numpy(parity.fill_input(tiny["input"])))
    for i, got in enumerate(maps):
        assert parity.relative_error(got.numpy(), tiny["outputs"][f"stage{i}"]) <= TOLERANCE


@pytest.mark.parametrize("num_classes", [1000, 5])
def test_create_model_refuses_a_file_of_another_model(tiny_file, num_classes):
    overlay = {"file": tiny_file}
    with pytest.raises(ValueError, match="does not fit VMamba"):
        timm.create_model("vmamba_small", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)


def meta_model(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize(("name", "file"), [("vmamba_tiny", "vmamba_tiny"), ("vmambav0_tiny", "vmambav0_tiny_odd")])
def test_own_names_pass_the_conversion_unchanged(name, file):
    assert_names_convert(meta_model(name), file)


def test_first_names_of_v0_checkpoints_are_accepted():
    model, state = meta_model("vmambav0_tiny"), meta_state("vmambav0_tiny_odd")
    renames = {
        "patch_embed.0.": "patch_embed.proj.",
        "patch_embed.2.": "patch_embed.norm.",
        ".norm.": ".ln_1.",
        ".op.": ".self_attention.",
        "classifier.": "",
    }
    old = {}
    for key, value in state.items():
        for now, then in renames.items():
            if not (now == ".norm." and ".blocks." not in key):
                key = key.replace(now, then)
        old[key] = value
    assert "norm.weight" in old and "layers.0.blocks.0.self_attention.out_norm.weight" in old
    assert "layers.0.blocks.0.ln_1.weight" in old and "layers.0.downsample.norm.weight" in old
    assert {k: v.shape for k, v in model.convert_official(old).items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_linear_layers_stored_as_1x1_convolutions_are_accepted():
    model, state = meta_model("vmamba_tiny"), meta_state("vmamba_tiny")
    pointwise = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    state = {key: value[:, :, None, None] if key.endswith(pointwise) else value for key, value in state.items()}
    assert sum(value.ndim == 4 for value in state.values()) > 50
    load_official(model, state)
