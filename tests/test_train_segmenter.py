"""The tool: its exit statuses and one-line messages."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from segmentation.samples import write_nnunet

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import train_segmenter

from vssm.segmentation import fitting


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a run of a second."""
    config = {
        "data": str(write_nnunet(tmp_path / "raw", cases=2)),
        "network": "monai.networks.nets.UNet",
        "network_arguments": {"channels": [4, 8], "strides": [2]},
        "folds": 2,
        "epochs": 1,
        "steps_per_epoch": 2,
        "patch_size": [8, 8, 8],
        "batch_size": 1,
        "augmentation": "none",
        "cpu": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]


def test_it_plans_trains_and_refuses_to_overwrite(arguments, tmp_path, capsys):
    assert train_segmenter.main([*arguments, "--plan-only"]) == 0
    plan = tmp_path / "run" / "plan.yaml"
    assert str(plan) in capsys.readouterr().out
    plan.write_text(plan.read_text().replace("batch_size: 1", "batch_size: 3"))
    assert train_segmenter.main(arguments) == 0
    assert "best mean Dice" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["plan"]["batch_size"] == 3
    assert train_segmenter.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert train_segmenter.main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize(
    "setting, words",
    [
        ("epochz=3", "unknown option epochz"),
        ("epochs=0", "option epochs must hold"),
        ("optimizer=adam", "must be one of sgd, adamw"),
        ("data=/nowhere", "/nowhere: no such file or folder"),
        ("channels=[T1, T2]", "has 1 channels, the dataset 2"),
        ("patch_size=[2000, 2000, 2000]", "by estimate patch_size"),
        ("patch_size=[8, 8, 7]", "for a patch of [8, 8, 7]"),
        ("network=vssm.networks.UMambaBot", "does not take"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, capsys, setting, words):
    assert train_segmenter.main([*arguments, "--set", setting]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_segmenter.py")]
    assert words in line


def test_running_out_of_memory_says_which_patch_fits(arguments, capsys, monkeypatch):
    def full(self, images, labels):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fitting.Run, "_forward", full)
    assert train_segmenter.main(arguments) == 2
    assert re.search(r"by estimate patch_size \[\d, \d, \d\] fits", capsys.readouterr().err)


def test_broken_numbers_are_status_1(arguments, capsys, monkeypatch):
    def broken(options):
        return lambda outputs, labels: outputs[0].sum() * float("nan")

    monkeypatch.setattr(fitting, "make_loss", broken)
    assert train_segmenter.main(arguments) == 1
    assert "training stopped at step 1" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        train_segmenter.main(["--help"])
    assert stop.value.code == 0
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().out
