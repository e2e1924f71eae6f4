"""The bundle that ships with vssm is a MONAI bundle by MONAI's own checks and does what its card says."""

import json
from pathlib import Path

import pytest
import torch
from demo_tool import demo_brain
from monai.bundle import verify_metadata, verify_net_in_out

from vssm.volumes import default_bundle_path, load_bundle, predict_volume, read_volume

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "model_zoo" / "brain_tissue_demo"
METADATA, INFERENCE = BUNDLE / "configs" / "metadata.json", BUNDLE / "configs" / "inference.json"

# What MONAI's meta_schema_20240725.json demands, as its bundle specification describes it; the file itself is on the
# network.
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        **{key: {"type": "string"} for key in ("type", "format", "dtype")},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TENSORS = {"type": "object", "additionalProperties": TENSOR}
TEXTS = (
    "schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
    "copyright",
)  # fmt: skip
OPTIONAL_TEXTS = ("data_source", "data_type", "image_classes", "label_classes", "pred_classes", "intended_use")
SCHEMA = {
    "type": "object",
    "required": [*TEXTS, "required_packages_version", "network_data_format"],
    "properties": {
        **{key: {"type": "string"} for key in (*TEXTS, *OPTIONAL_TEXTS)},
        **{key: {"type": "object"} for key in ("changelog", "required_packages_version", "eval_metrics")},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
}


@pytest.fixture
def schema(tmp_path):
    """File of the schema; MONAI does not download what is there already."""
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.fixture(scope="module")
def metadata():
    return json.loads(METADATA.read_text())


def test_the_files_the_bundle_format_asks_for_are_there_and_the_weights_are_small():
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md"):
        assert (BUNDLE / name).stat().st_size > 0
    assert sum(path.stat().st_size for path in (BUNDLE / "models").iterdir()) <= 3_000_000


def test_monai_verifies_the_metadata(schema):
    verify_metadata(meta_file=str(METADATA), filepath=str(schema))


def test_the_verification_would_notice_what_is_missing(schema, metadata, tmp_path):
    for change in ({"task": None}, {"network_data_format": {"inputs": {}}}):
        (tmp_path / "metadata.json").write_text(json.dumps(metadata | change))
        with pytest.raises(ValueError, match="Failed validating"):
            verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(schema))


@pytest.mark.parametrize("n", [1, 3])
def test_monai_verifies_the_networks_input_and_output(n):
    verify_net_in_out("network_def", meta_file=str(METADATA), config_file=str(INFERENCE), device="cpu", n=n)


def test_it_is_the_default_of_vssm_segment(metadata):
    assert default_bundle_path().resolve() == BUNDLE
    bundle = load_bundle(BUNDLE)
    assert bundle.labels == ("background", "grey matter", "white matter")
    assert bundle.foreground_ml == metadata["learned_from"]["foreground_ml"]


def test_the_weights_are_a_plain_state_dict():
    weights = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) and tensor.isfinite().all() for tensor in weights.values())


def test_the_card_says_what_it_is_and_repeats_the_figures_of_the_metadata(metadata):
    card = " ".join((BUNDLE / "docs" / "README.md").read_text().split())
    for words in ("not a medical device", "left half of a single template", "mirror image"):
        assert words in card
    figures = metadata["eval_metrics"]
    assert f"| {figures['dice_gm_held_out']:.3f} | {figures['dice_wm_held_out']:.3f} |" in card


def test_the_licence_carries_the_templates_notice():
    text = " ".join((BUNDLE / "LICENSE").read_text().split())
    assert "Apache License" in text
    assert "Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre" in text


def test_the_shipped_weights_reach_the_figures_on_the_card(metadata, tmp_path):
    demonstration = demo_brain.Demonstration(demo_brain.read_options(demo_brain.Options, demo_brain.CONFIG, []))
    demo_brain.write_scan(demonstration, tmp_path / "scan.nii.gz")
    labels = predict_volume(read_volume(tmp_path / "scan.nii.gz"), load_bundle(BUNDLE), device="cpu")
    dice = demonstration.score(torch.from_numpy(labels))
    figures = metadata["eval_metrics"]
    assert dice["gm"] == pytest.approx(figures["dice_gm_held_out"], abs=0.002)
    assert dice["wm"] == pytest.approx(figures["dice_wm_held_out"], abs=0.002)
    assert (dice["gm"] + dice["wm"]) / 2 >= 0.89
