"""The training run: it learns, resumes bit-exactly wherever it was killed, stops at broken numbers and bad input."""

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from vssm.segmentation import fitting, train
from vssm.segmentation.fitting import BEST, LAST
from vssm.training.checkpoints import load_checkpoint
from vssm.training.diagnosis import TrainingError
from vssm.training.records import read_rows

ROOT = Path(__file__).resolve().parents[2]


class Crash(BaseException):
    """Stands for a power cut."""


def assert_same_run(one, two):
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    for name in (LAST, BEST):
        first, second = load_checkpoint(one / name), load_checkpoint(two / name)
        assert first["step"] == second["step"]
        for key in ("network", "iterate"):
            for weight, value in first.get(key, {}).items():
                torch.testing.assert_close(value, second[key][weight], atol=0, rtol=0)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    outcome = train(options, folder)
    assert not outcome.interrupted
    return folder


def test_a_run_writes_its_plan_records_checkpoints_and_pictures(finished, options):
    rows = read_rows(finished / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["dice"] == pytest.approx((row["dice_ball"] + row["dice_box"]) / 2)
    for name in ("curves.png", "worst_cases.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert (finished / "plan.yaml").exists()
    assert list((finished / "tensorboard").iterdir())
    best = load_checkpoint(finished / BEST)
    assert best["dice"] == max(row["dice"] for row in rows)
    assert best["dataset"]["labels"] == ["background", "ball", "box"]
    # the averaged weights are the result
    last = load_checkpoint(finished / LAST)
    assert any(not torch.equal(last["network"][name], value) for name, value in last["iterate"].items())
    assert not [path for path in finished.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize(
    "moment, done",
    [("in an epoch", 3), ("before last.pt", 3), ("after the row", 3), ("before best.pt", 0)],
)
def test_a_run_that_crashed_anywhere_resumes_to_the_same_numbers(
    finished, options, tmp_path, monkeypatch, moment, done
):
    save, add, saved = fitting.save_checkpoint, fitting.Records.add, []

    def stop_at_step(now):
        if moment == "in an epoch" and now.step == 5:
            raise Crash

    def crash_before_saving(state, path):
        saved.append(f"before {path.name}")
        # the first best.pt comes before there is a last.pt
        if saved[-1] == moment and saved.count(moment) == (2 if done else 1):
            raise Crash
        save(state, path)

    def crash_after_row(self, row):
        add(self, row)
        if moment == "after the row" and row["epoch"] == 2:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_checkpoint", crash_before_saving)
        patch.setattr(fitting.Records, "add", crash_after_row)
        with pytest.raises(Crash):
            train(options, tmp_path / "run", on_step=stop_at_step)
    last = tmp_path / "run" / LAST
    assert (load_checkpoint(last)["step"] if last.exists() else 0) == done
    train(options, tmp_path / "run", resume=True)
    assert_same_run(finished, tmp_path / "run")


def test_a_process_killed_at_a_random_moment_resumes_to_the_same_numbers(options, tmp_path):
    long = replace(options, epochs=15, validate_every=15, augmentation="flips")
    train(long, tmp_path / "whole")
    code = (
        "import sys; from pathlib import Path; from vssm.segmentation import TrainingOptions, train\n"
        f"train(TrainingOptions(**{dataclasses.asdict(long)!r}), Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")], env=environment)
    while killed.poll() is None and not (tmp_path / "killed" / LAST).exists():
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.2))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert 0 < load_checkpoint(tmp_path / "killed" / LAST)["step"] < 45
    train(long, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_signal_saves_inside_the_epoch_and_the_rest_is_the_same(finished, options, tmp_path):
    def interrupt(moment):
        if moment.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train(options, tmp_path / "run", on_step=interrupt)
    assert (outcome.interrupted, outcome.steps) == (True, 5)
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == 5
    assert not train(options, tmp_path / "run", resume=True).interrupted
    assert_same_run(finished, tmp_path / "run")


def test_accumulated_batches_are_one_large_batch(plain_options, tmp_path):
    train(plain_options, tmp_path / "large")
    train(replace(plain_options, batch_size=1, accumulation=2), tmp_path / "parts")
    large, parts = (read_rows(tmp_path / name / "metrics.csv") for name in ("large", "parts"))
    assert large[0]["loss"] == pytest.approx(parts[0]["loss"], abs=1e-5)
    assert large[0]["gradient_norm"] == pytest.approx(parts[0]["gradient_norm"], rel=1e-3)


def test_workers_change_nothing(finished, options, tmp_path):
    train(replace(options, workers=1), tmp_path / "run")
    assert_same_run(finished, tmp_path / "run")


def test_bf16_is_near_float32_and_keeps_float32_weights(plain_options, tmp_path):
    train(plain_options, tmp_path / "no")
    # accelerate keeps one precision for a process
    AcceleratorState._reset_state(reset_partial_state=True)
    train(replace(plain_options, precision="bf16"), tmp_path / "bf16")
    exact, rounded = (read_rows(tmp_path / name / "metrics.csv")[0]["loss"] for name in ("no", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {value.dtype for value in load_checkpoint(tmp_path / "bf16" / LAST)["iterate"].values()} == {torch.float32}


def test_it_learns_what_is_easy(plain_options, tmp_path):
    easy = replace(plain_options, epochs=4, steps_per_epoch=25, validate_every=4, optimizer="adamw", schedule="cosine",
                   learning_rate=0.02, foreground_share=0.9, average_decay=0.9)  # fmt: skip
    assert train(easy, tmp_path / "run").best_dice > 0.6


def test_broken_images_stop_the_run_and_are_kept(options, tmp_path, monkeypatch):
    read = fitting.PatchDataset.__getitem__

    def spoil(self, index):
        image, labels, name = read(self, index)
        if index == 9:
            image[0, 0, 0, 0] = float("nan")
        return image, labels, name

    monkeypatch.setattr(fitting.PatchDataset, "__getitem__", spoil)
    with pytest.raises(TrainingError, match=r"step 5: loss nan .* the images hold values .*bad_batch\.pt"):
        train(options, tmp_path / "run")
    batch = load_checkpoint(tmp_path / "run" / "bad_batch.pt")
    assert torch.isnan(batch["images"]).any()
    assert len(batch["cases"]) == 2
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == 3


@pytest.mark.parametrize(
    "step, words", [(4, "step 5: loss .* the weights of model"), (6, "stopped after step 6: the weights of model")]
)
def test_weights_that_overflow_stop_the_run_and_never_reach_a_checkpoint(options, tmp_path, step, words):
    run = fitting.Run(options, tmp_path / "run", False, list)

    def overflow(moment):
        if moment.step == step:
            with torch.no_grad():
                next(run.plain.parameters()).fill_(float("inf"))

    with pytest.raises(TrainingError, match=words):
        run(overflow)
    last = load_checkpoint(tmp_path / "run" / LAST)
    assert last["step"] == 3
    assert all(torch.isfinite(value).all() for value in last["iterate"].values())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"network": "vssm.networks.Nothing"}, "network 'vssm.networks.Nothing' is unknown"),
        ({"network_arguments": {"channels": [4, 8]}}, "does not take"),
        ({"channels": ["T1", "T2"]}, "has 1 channels, the dataset 2"),
        ({"labels": {0: "background", 1: "ball"}}, "holds the label 2, the dataset names 0 to 1"),
        ({"data": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"fold": 7}, "fold 7 does not exist"),
        ({"patch_size": [4096, 4096, 4096]}, r"needs about .* by estimate patch_size \[\d+, \d+, \d+\] fits"),
    ],
)
def test_bad_input_is_refused_before_training(options, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        train(replace(options, **change), tmp_path / "run")


def test_runs_are_not_overwritten_and_not_resumed_with_other_options(finished, options, tmp_path):
    with pytest.raises(ValueError, match="holds a run; continue it with --resume"):
        train(options, finished)
    with pytest.raises(ValueError, match=r"was started with learning_rate=0\.05, now it is 0\.1"):
        train(replace(options, learning_rate=0.1), finished, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(options, tmp_path, resume=True)


def test_a_damaged_checkpoint_is_refused(options, tmp_path):
    train(replace(options, epochs=1, augmentation="none"), tmp_path / "run")
    path = tmp_path / "run" / LAST
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.pt: is damaged"):
        train(options, tmp_path / "run", resume=True)
