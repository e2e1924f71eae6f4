"""The command: it trains the digits to what README says, forecasts, compares, and refuses in one line."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
import yaml
from classification.pictures import write_pictures
from PIL import Image
from timm.data import create_transform, resolve_data_config

from vssm import cli
from vssm.classification.data import VALIDATION, Digits
from vssm.classification.trained import Trained, write_trained
from vssm.training.records import read_rows

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "configs" / "imagenet" / "digits.yaml"
SMALL = (
    *("--set", "cpu=true", "--set", "image_size=32", "--set", "batch_size=4"),
    *("--set", "model_arguments={depths: [1, 1], dims: [8, 16]}"),
)


@pytest.fixture
def command():
    """main(arguments) of tools/train_classifier.py."""
    return runpy.run_path(str(ROOT / "tools" / "train_classifier.py"))["main"]


def test_digits_are_learnt_to_what_the_readme_says(command, tmp_path, capsys):
    arguments = ["--config", str(DIGITS), "--output", str(tmp_path / "run"), "--set", "cpu=true"]
    assert command(arguments) == 0
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    best = max(max(row["top1"], row["average_top1"]) for row in rows)
    assert best >= 98
    assert f"best top-1 in validation {best:.2f} %" in capsys.readouterr().out
    assert (tmp_path / "run" / "confusion.png").exists()


def test_a_dry_run_forecasts_and_writes_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(["--config", str(DIGITS), "--dry-run", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "1433 pictures to train on, 364 to validate, 10 classes" in out
    assert "358 an epoch of 4 pictures" in out
    assert "GB a device" in out
    assert "s a step" in out
    assert not list(tmp_path.iterdir())


def test_a_benchmark_trains_peers_by_the_same_code(command, capsys):
    # a peer small enough for a test
    assert command(["--config", str(DIGITS), "--benchmark", "--peers", "mobilenetv3_small_050", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("32 px, batch 4, precision no; memory by estimate")
    assert [line.split()[0] for line in lines[1:]] == ["model", "vmamba_tiny", "mobilenetv3_small_050"]
    assert float(lines[3].split()[3]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml", "--output", "run"], "nowhere.yaml: cannot be read"),
        (["--config", str(DIGITS)], "--output is needed"),
        (["--config", str(DIGITS), "--output", "run", "--set", "data=nowhere"], "nowhere: no such folder"),
        (["--config", str(DIGITS), "--output", "run", "--set", "modle=x"], "unknown option modle"),
        (["--config", str(DIGITS), "--output", "run", "--set", "model=resnet"], "no model is called resnet"),
        (["--config", str(DIGITS), "--output", "run", "--resume"], "holds no run to resume"),
        (["--config", "loop.yaml", "--output", "run"], "its base loop.yaml is based on it"),
    ],
)
def test_wrong_input_is_one_line(command, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"base": "loop.yaml"}))
    try:
        status = command(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.startswith("train_classifier.py: ")
    assert "\n" not in said


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_picture_that_cannot_be_read_is_one_line_with_its_name(command, tmp_path, capsys, part, workers):
    for folder in ("train", "val"):
        write_pictures(tmp_path / folder, {"cat": [10, 20], "dog": [200, 210]})
    (tmp_path / part / "dog" / "1.png").write_bytes(b"no picture")
    settings = [f"data={tmp_path}", f"workers={workers}", "epochs=2"]
    arguments = ["--config", str(DIGITS), "--output", str(tmp_path / "run"), *SMALL]
    assert command([*arguments, *(word for setting in settings for word in ("--set", setting))]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"{tmp_path / part / 'dog' / '1.png'} cannot be read as a picture" in said[0]


def test_a_trained_file_names_what_a_picture_shows(tmp_path, capsys):
    digits = Digits(VALIDATION)
    torch.manual_seed(0)
    arguments = {"depths": [1, 1], "dims": [8, 16], "num_classes": 10}
    model = timm.create_model("vmamba_tiny", **arguments)
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    names = [f"digit {index}" for index in range(10)]
    write_trained(tmp_path / "best.safetensors", model, Trained("vmamba_tiny", arguments, names, config, 50.0, 1))
    Image.fromarray(digits.pictures[0]).save(tmp_path / "digit.png")
    assert cli.main(["classify", str(tmp_path / "digit.png"), "--weights", str(tmp_path / "best.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("digit " in line for line in lines)
    image = create_transform(**config)(Image.open(tmp_path / "digit.png").convert("RGB"))[None]
    with torch.inference_mode():
        best = model.eval()(image)[0].softmax(0).max(0)
    assert lines[0] == f"{100 * best.values.item():5.1f} %  digit {best.indices.item()}"
