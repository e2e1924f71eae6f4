"""The training run of a classifier: it learns, resumes bit-exactly wherever it stopped, and says what is wrong."""

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import safe_open

from vssm.classification import fitting
from vssm.classification.evaluating import evaluate
from vssm.classification.fitting import BEST, LAST, Run, train
from vssm.classification.options import ClassifierOptions
from vssm.classification.trained import load_trained, read_trained
from vssm.training.checkpoints import load_checkpoint
from vssm.training.diagnosis import TrainingError
from vssm.training.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
# every random part is on: order, crop, flip, RandAugment, erasing, mixing, stochastic depth
OPTIONS = ClassifierOptions(
    model="vmamba_tiny",
    model_arguments={"depths": [1, 1], "dims": [8, 16]},
    drop_path=0.2,
    data="digits",
    image_size=32,
    epochs=3,
    steps_per_epoch=4,
    batch_size=8,
    rate_batch=0,
    warmup_epochs=1,
    average_decay=0.5,
    cpu=True,
)


class Crash(BaseException):
    """Stands for a power cut."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(OPTIONS, folder).signal is None
    return folder


def read_weights(path):
    """Tensors by name, and the metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def assert_same_run(one, two):
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    (tensors, metadata), (others, other_metadata) = (read_weights(folder / BEST) for folder in (one, two))
    assert metadata == other_metadata
    torch.testing.assert_close(tensors, others, atol=0, rtol=0)
    first, second = load_checkpoint(one / LAST), load_checkpoint(two / LAST)
    for key in ("step", "epochs", "best"):
        assert first[key] == second[key]
    for key in ("network", "average"):
        for name, value in first[key].items():
            torch.testing.assert_close(value, second[key][name], atol=0, rtol=0)


def test_a_run_writes_its_records_weights_and_pictures(finished):
    rows = read_rows(finished / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {"top1", "top5", "validation_loss", "average_top1", "gradient_norm"} <= rows[0].keys()
    for name in ("curves.png", "confusion.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())
    assert yaml.safe_load((finished / "config.yaml").read_text()) == asdict(OPTIONS)
    last = load_checkpoint(finished / LAST)
    assert last["best"] == max(max(row["top1"], row["average_top1"]) for row in rows)
    assert any(not torch.equal(last["average"][name], value) for name, value in last["network"].items())
    assert not [path for path in finished.rglob("*") if "partial" in path.name]


def test_the_best_weights_are_a_file_of_timm(finished):
    facts = read_trained(finished / BEST)
    model = timm.create_model(facts.model, **facts.arguments, checkpoint_path=str(finished / BEST))
    run = Run(OPTIONS, None)
    assert evaluate(model, run.validation, "cpu")["top1"] == pytest.approx(facts.top1, abs=1e-3)
    assert facts.classes == [str(digit) for digit in range(10)]
    assert facts.top1 == load_checkpoint(finished / LAST)["best"]
    loaded = load_trained(finished / BEST, facts).state_dict()
    torch.testing.assert_close(loaded, dict(model.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("moment", ["in an epoch", "before last.pt", "after the row", "before the best weights"])
def test_a_run_that_crashed_anywhere_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch, moment):
    save, add, saved = fitting.save_checkpoint, fitting.Records.add, []

    def stop_at_step(now):
        if moment == "in an epoch" and now.step == 6:
            raise Crash

    def stop_before_saving(state, path):
        saved.append(path)
        if moment == "before last.pt" and len(saved) == 2:
            raise Crash
        save(state, path)

    def stop_after_row(records, row):
        add(records, row)
        if moment == "after the row" and row["epoch"] == 2:
            raise Crash

    def stop_before_best(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_checkpoint", stop_before_saving)
        patch.setattr(fitting.Records, "add", stop_after_row)
        if moment == "before the best weights":
            patch.setattr(fitting, "write_trained", stop_before_best)
        with pytest.raises(Crash):
            train(OPTIONS, tmp_path / "run", on_step=stop_at_step)
    train(OPTIONS, tmp_path / "run", resume=True)
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_in_the_middle_of_an_epoch(finished, tmp_path, kind):
    def send(now):
        if now.step == 6:
            os.kill(os.getpid(), kind)

    outcome = train(OPTIONS, tmp_path / "run", on_step=send)
    # the step that runs when the signal comes is finished
    assert (outcome.signal, outcome.steps) == (kind, 7)
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == 7
    train(OPTIONS, tmp_path / "run", resume=True)
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.parametrize("validation", [3, 7])
def test_a_signal_stops_a_validation_and_the_drawing(finished, tmp_path, validation):
    """Of the seven, the first six rate network and average in turn, the last one draws."""
    seen = []

    def send(batches):
        seen.append(1)
        if len(seen) == validation:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches

    outcome = train(OPTIONS, tmp_path / "run", progress=send)
    assert outcome.signal == signal.SIGTERM
    assert not (tmp_path / "run" / "confusion.png").exists()
    train(OPTIONS, tmp_path / "run", resume=True)
    assert_same_run(finished, tmp_path / "run")
    assert (tmp_path / "run" / "confusion.png").exists()


def _train_in_child(options, folder, resume):
    torch.set_num_threads(1)
    train(options, folder, resume)


def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    """Runs are killed and resumed until ten kills are counted; each ends as the run that nobody killed.

    Children are forked from a process that has imported everything, so that the kills hit the training.
    """
    options = replace(OPTIONS, epochs=12, steps_per_epoch=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vssm.classification.fitting", "torch.utils.tensorboard"])
    # the server imports before the first child is timed
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    whole = tmp_path / "whole"
    begun = time.monotonic()
    assert _run_in_child(context, options, whole, False, None)
    took = time.monotonic() - begun
    drawn, kills, runs = random.Random(0), 0, 0
    while kills < 10:
        folder, finished = tmp_path / f"killed_{runs}", False
        runs += 1
        while not finished:
            wait = drawn.uniform(0.1, 0.4) * took if kills < 10 else None
            finished = _run_in_child(context, options, folder, (folder / fitting.CONFIG).exists(), wait)
            kills += not finished
        assert_same_run(whole, folder)
    assert kills == 10
    # a run of no more than a kill or two would say little about many
    assert runs <= 5


def _run_in_child(context, options, folder, resume, wait):
    """Train in a child of its own and kill it after `wait` seconds; whether it finished before."""
    child = context.Process(target=_train_in_child, args=(options, folder, resume))
    child.start()
    child.join(wait)
    if child.exitcode is None:
        child.kill()
        child.join()
        return False
    assert child.exitcode == 0
    return True


def test_the_command_ends_well_when_it_is_terminated(tmp_path):
    given = asdict(replace(OPTIONS, epochs=1000))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    command = [
        *(sys.executable, str(ROOT / "tools" / "train_classifier.py")),
        *("--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / LAST).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    step = load_checkpoint(tmp_path / "run" / LAST)["step"]
    assert f"stopped after step {step}; continue with --resume" in said


def test_two_gloo_processes_learn_what_one_with_twice_the_batch_learns(tmp_path):
    # mixing pairs the pictures of a process, stochastic depth differs between processes
    options = replace(OPTIONS, batch_size=4, mixup=0.0, cutmix=0.0, drop_path=0.0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(options)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(ROOT / "tools" / "train_classifier.py"), "--config", str(tmp_path / "config.yaml")),
        *("--output", str(tmp_path / "two")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    train(replace(options, batch_size=8), tmp_path / "one")
    one, two = (read_rows(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert [row["epoch"] for row in two] == [1, 2, 3]
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "validation_loss"):
            assert first[name] == pytest.approx(second[name], abs=1e-4)
        assert first["top1"] == pytest.approx(second["top1"], abs=0.6)
    states = [load_checkpoint(tmp_path / name / LAST) for name in ("one", "two")]
    assert len(states[1]["random"]) == 2
    for name, weight in states[0]["network"].items():
        torch.testing.assert_close(weight, states[1]["network"][name], atol=1e-4, rtol=1e-3)


def test_accumulated_batches_are_one_large_one(tmp_path):
    plain = replace(OPTIONS, epochs=2, mixup=0.0, cutmix=0.0, drop_path=0.0)
    train(plain, tmp_path / "one")
    train(replace(plain, batch_size=4, accumulation=2), tmp_path / "two")
    one, two = (read_rows(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)


def test_bfloat16_stays_close_to_float32(tmp_path):
    plain = replace(OPTIONS, epochs=2)
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(replace(plain, precision=precision), tmp_path / precision)
        losses.append([row["loss"] for row in read_rows(tmp_path / precision / "metrics.csv")])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_broken_numbers_stop_the_run_and_keep_the_last_good_state(tmp_path, monkeypatch):
    def poison(now):
        if now.step == 5:
            monkeypatch.setattr(
                Run, "_next", lambda run, batches: (torch.full((8, 3, 32, 32), math.nan), torch.zeros(8).long())
            )

    with pytest.raises(TrainingError, match=r"at step 6: .*the images hold values that are not finite.*bad_batch\.pt"):
        train(OPTIONS, tmp_path / "run", on_step=poison)
    assert load_checkpoint(tmp_path / "run" / LAST)["step"] == 4
    assert load_checkpoint(tmp_path / "run" / "bad_batch.pt")["images"].isnan().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "vmamba_huge"}, "no model is called vmamba_huge"),
        ({"model_arguments": {"depth": 3}}, "vmamba_tiny cannot be made with"),
        ({"precision": "fp16"}, "precision fp16 needs an accelerator"),
        ({"num_classes": 3}, "num_classes is 3, the data have 10 classes"),
        ({"weights": "nowhere.pth"}, "neither a file nor a row of the zoo"),
        ({"distillation": "hard", "teacher": "resnet18"}, "vmamba_tiny has no second classifier"),
        ({"batch_size": 2000, "steps_per_epoch": 0}, "1433 pictures to train on are fewer"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        train(replace(OPTIONS, **changed), tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 7}, "batch_size must be even, got 7"),
        ({"mesa": 1.0, "average_decay": 0.0}, "set average_decay above 0"),
        ({"teacher": "resnet18"}, "a teacher needs distillation"),
        ({"warmup_epochs": 3}, r"warmup_epochs \(3\) must be below epochs \(3\)"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **changed)


def test_a_folder_keeps_its_run(finished):
    with pytest.raises(ValueError, match="holds a run; continue it with --resume"):
        train(OPTIONS, finished)
    with pytest.raises(ValueError, match=r"was started with learning_rate=0\.001, now it is 0\.5"):
        train(replace(OPTIONS, learning_rate=0.5), finished, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(OPTIONS, finished.parent / "new", resume=True)
