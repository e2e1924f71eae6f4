"""The demonstration, run for real at a small size: what it writes, what it never looks at, how it refuses options."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from demo_tool import demo_brain

from vssm.volumes import segment_file
from vssm.volumes.phantom import load_phantom

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "resolution_mm": 4,
    "steps": 3,
    "patch_size": [16, 24, 24],
    "tuning_scans": 1,
    "smoothing_voxels": [0.5],
}


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory):
    """The shipped bundle with a tiny network that works at 4 mm."""
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    shutil.copytree(ROOT / "model_zoo" / "brain_tissue_demo", folder)
    path = folder / "configs" / "inference.json"
    definition = json.loads(path.read_text())
    definition["network_def"]["features"] = [4, 8, 8]
    definition["inferer"]["roi_size"] = [16, 24, 24]
    (spacing,) = [step for step in definition["preprocessing"]["transforms"] if "pixdim" in step]
    spacing["pixdim"] = [4.0, 4.0, 4.0]
    path.write_text(json.dumps(definition))
    return folder


@pytest.fixture(scope="module")
def settings(small_bundle):
    return [f"--set={key}={value}" for key, value in {"bundle": small_bundle, **SMALL}.items()]


@pytest.fixture(scope="module")
def output(settings, tmp_path_factory):
    """The folder of one finished run."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    assert demo_brain.main(["--output", str(folder), *settings]) == 0
    return folder


@pytest.fixture
def options(small_bundle):
    return replace(
        demo_brain.read_options(demo_brain.Options, demo_brain.CONFIG, []), bundle=str(small_bundle), **SMALL
    )


def test_the_report_holds_the_promised_keys_with_dice_between_0_and_1(output):
    report = json.loads((output / "report.json").read_text())
    assert report["seconds"] > 0
    tables = [report["dice"], report["control"], *report["baselines"].values()]
    assert report["baselines"].keys() == {"threshold", "smoothed_threshold"}
    for table in tables:
        assert {"gm", "wm"} <= table.keys()
        assert 0 <= table["gm"] <= 1
        assert 0 <= table["wm"] <= 1
    assert report["parameters"]["network"] > report["parameters"]["control"]
    assert report["options"]["steps"] == SMALL["steps"]


def test_scan_and_label_map_lie_exactly_on_the_templates_grid(output):
    template = load_phantom(SMALL["resolution_mm"]).image
    for name in ("input.nii.gz", "segmentation.nii.gz"):
        image = nibabel.load(output / name)
        assert image.shape == template.shape
        np.testing.assert_array_equal(image.affine, template.affine)
        for code in ("qform_code", "sform_code"):
            assert image.header[code] == template.header[code]
    labels = np.asarray(nibabel.load(output / "segmentation.nii.gz").dataobj)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 1, 2}


def test_the_picture_is_a_png_and_no_partial_file_is_left(output):
    assert (output / "overlay.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in output.rglob("*") if "partial" in path.name]


def test_the_command_line_segments_the_scan_to_the_same_file_with_the_written_bundle(output, tmp_path):
    segment_file(output / "input.nii.gz", tmp_path / "again.nii.gz", bundle=output / "bundle", device="cpu")
    again, written = (nibabel.load(path) for path in (tmp_path / "again.nii.gz", output / "segmentation.nii.gz"))
    np.testing.assert_array_equal(again.dataobj, written.dataobj)
    # The command notes in `descrip` what its result was made from; all else is the same to the byte.
    for image in (again, written):
        image.header["descrip"] = b""
    assert again.header.binaryblock == written.header.binaryblock


def test_a_second_run_gives_the_same_figures_and_exports_the_same_bundle(output, settings, tmp_path):
    arguments = ["--output", str(tmp_path / "demo"), "--export-bundle", str(tmp_path / "exported"), *settings]
    assert demo_brain.main(arguments) == 0
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (output, tmp_path / "demo"))
    for key in ("dice", "baselines", "control"):
        assert first[key] == second[key]
    one, two = (torch.load(folder / "models" / "model.pt") for folder in (output / "bundle", tmp_path / "exported"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=0, rtol=0)
    card = (tmp_path / "exported" / "docs" / "README.md").read_text()
    assert f"| {second['dice']['gm']:.3f} | {second['dice']['wm']:.3f} |" in card
    metadata = json.loads((tmp_path / "exported" / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"]["dice_gm_held_out"] == second["dice"]["gm"]


def test_nothing_right_of_the_midline_reaches_tuning_or_training(options, monkeypatch):
    def other_right_side(resolution_mm):
        phantom = load_phantom(resolution_mm)
        intensity, labels = phantom.intensity.clone(), phantom.labels.clone()
        right = phantom.box(options.test_box_mm)
        intensity[right], labels[right] = 0.5, 2
        return replace(phantom, intensity=intensity, labels=labels)

    honest = demo_brain.Demonstration(options)
    monkeypatch.setattr(demo_brain, "load_phantom", other_right_side)
    # what noise levels refer to is one number of the template as a whole
    altered = demo_brain.Demonstration(options)
    assert not torch.equal(altered.scan, honest.scan)
    assert altered.tune([0.0, 0.5]) == honest.tune([0.0, 0.5])
    for one, two in zip(
        altered.train("a", altered.bundle_network).parameters(),
        honest.train("b", honest.bundle_network).parameters(),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=0, rtol=0)


def test_network_and_control_see_the_same_patches(options, monkeypatch):
    seen = []

    def record(network, next_batch, recipe, on_step):
        seen.append([next_batch() for _ in range(3)])

    monkeypatch.setattr(demo_brain, "fit", record)
    demonstration = demo_brain.Demonstration(options)
    demonstration.train("a", demonstration.bundle_network)
    demonstration.train("b", lambda: demonstration.bundle_network(mixer="none"))
    for (images, labels), (others, other_labels) in zip(*seen, strict=True):
        torch.testing.assert_close(images, others, atol=0, rtol=0)
        torch.testing.assert_close(labels, other_labels, atol=0, rtol=0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "stepz=3"], "unknown option stepz"),
        (["--set", "steps"], "KEY=VALUE is needed"),
        (["--set", "steps=many"], "option steps must be int, got 'many'"),
        (["--set", "steps=[3"], "--set steps=[3: is not YAML"),
        (["--set", "steps=true"], "option steps must be int"),
        (["--set", "noise=-0.1"], "option noise must hold numbers from 0 to 1, one of them, got -0.1"),
        (
            ["--set", "learning_rate=.nan"],
            "option learning_rate must hold numbers from 1e-07 to 1, one of them, got nan",
        ),
        (["--set", "test_box_mm=[0, 200]"], "3 x 2 of them, got [0, 200]"),
        (["--set", "patch_size=[a, 8, 8]"], "option patch_size must hold whole numbers from 4 to 256, 3 of"),
        (["--set", "patch_size=[8.5, 8, 8]"], "got [8.5, 8, 8]"),
        (["--set", "bundle=nowhere"], "nowhere"),
        (["--set", "resolution_mm=8"], "do not fit"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_bad_options_are_one_line_and_status_2(tmp_path, capsys, arguments, words):
    assert demo_brain.main(["--output", str(tmp_path), *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message


def test_a_file_that_misses_an_option_or_is_no_table_is_refused(tmp_path, capsys):
    values = yaml.safe_load(demo_brain.CONFIG.read_text())
    del values["seed"]
    for content, words in ((yaml.safe_dump(values), "missing option seed"), ("- a\n- b\n", "table of options")):
        (tmp_path / "config.yaml").write_text(content)
        assert demo_brain.main(["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        demo_brain.main(["--help"])
    assert stop.value.code == 0
    assert "python tools/demo_brain.py --output trial --set steps=50" in capsys.readouterr().out
