"""Two processes see what one process with twice the batch sees, and learn the same."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from vssm.segmentation import train
from vssm.training.checkpoints import load_checkpoint
from vssm.training.records import read_rows

ROOT = Path(__file__).resolve().parents[2]


def test_two_gloo_processes_have_the_loss_curve_of_one_with_twice_the_batch(plain_options, tmp_path):
    options = replace(plain_options, epochs=3, steps_per_epoch=2, batch_size=1, augmentation="flips")
    # an empty list means "planned" and is written by leaving it out
    given = {key: value for key, value in dataclasses.asdict(options).items() if value != []}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(ROOT / "tools" / "train_segmenter.py"), "--config", str(tmp_path / "config.yaml")),
        *("--output", str(tmp_path / "two")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    train(replace(options, batch_size=2), tmp_path / "one")
    one, two = (read_rows(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert [row["epoch"] for row in two] == [1, 2, 3]
    for first, second in zip(one, two, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
        assert first["dice"] == pytest.approx(second["dice"], abs=5e-3)
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two")]
    assert len(states[1]["random"]) == 2
    for name, weight in states[0]["network"].items():
        torch.testing.assert_close(weight, states[1]["network"][name], atol=1e-4, rtol=1e-3)
