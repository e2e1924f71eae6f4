"""Sharded weights: two processes that split them train as two that hold them whole, and resume."""

import copy
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import families
import psutil
import pytest
import timm
import torch
import yaml
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from vssm.classification.fitting import BEST, LAST, Run, train
from vssm.classification.forecasting import state_bytes
from vssm.classification.options import ClassifierOptions
from vssm.classification.sharding import gather, scatter, shard, sharded_state, whole_state
from vssm.classification.trained import load_trained, read_trained
from vssm.training.checkpoints import load_checkpoint
from vssm.training.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
# batch norms, blocks of two kinds
OPTIONS = ClassifierOptions(
    model="efficientvmamba_tiny",
    model_arguments={"depths": [1, 1, 1], "dims": [8, 16, 24]},
    drop_path=0.1,
    data="digits",
    image_size=32,
    epochs=3,
    steps_per_epoch=4,
    batch_size=4,
    rate_batch=0,
    warmup_epochs=1,
    average_decay=0.5,
    cpu=True,
)
PEERS = {
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 8, "num_heads": (1, 2), "img_size": 64},
}


def small(name, seed=0):
    """A small model in training mode, the same in every process."""
    if name not in PEERS:
        return families.create(name, seed).train()
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=3, **PEERS[name]).train()


def step(network, optimizer, seed):
    """One step on a batch that all processes have: the mean of their gradients is the gradient."""
    torch.manual_seed(seed)
    loss = cross_entropy(network(torch.randn(4, 3, 64, 64)), torch.arange(4) % 3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def compare(rank, folder, names):
    """Two steps with shards, state and weights taken out and put back between, beside two without."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    for name in names:
        plain, network = small(name), small(name)
        whole = copy.deepcopy(network)
        shard(network, WORLD)
        parts = list(network.parameters())
        assert all(isinstance(part, DTensor) for part in parts), name
        held = sum(part.to_local().numel() for part in parts)
        # half, but for what does not divide
        assert held < 0.6 * sum(part.numel() for part in parts), name
        ours, theirs = (torch.optim.AdamW(one.parameters(), lr=0.01) for one in (network, plain))
        step(network, ours, 1)
        step(plain, theirs, 1)
        gather(network, whole, gradients=True)
        expect(name, whole, plain, gradients=True)
        state = whole_state(ours.state_dict())
        # into another sharded network, whose weights were drawn anew
        again = small(name, seed=5)
        shard(again, WORLD)
        scatter(whole, again)
        ours = torch.optim.AdamW(again.parameters(), lr=0.01)
        ours.load_state_dict(sharded_state(state, ours))
        step(again, ours, 2)
        step(plain, theirs, 2)
        gather(again, whole)
        expect(name, whole, plain, gradients=False)
    torch.distributed.destroy_process_group()


def expect(name, whole, plain, gradients):
    for (key, one), (_, other) in zip(whole.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda said, key=key: f"{name} {key}: {said}")
    if gradients:
        for one, other in zip(whole.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_every_family_trains_on_shards_as_on_whole_weights(tmp_path):
    names = [next(name for name in families.NAMES if name.split("_")[0] == kind) for kind in families.FAMILIES]
    torch.multiprocessing.spawn(compare, args=(str(tmp_path), [*names, *PEERS]), nprocs=WORLD)


def launch(options, folder, *more):
    """Start two processes on the run in `folder`."""
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(asdict(options)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"),
        *(str(ROOT / "tools" / "train_classifier.py"), "--config", str(config), "--output", str(folder), *more),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, said = process.communicate()
    assert process.returncode == 0, said[-3000:]


# Networks without batch norm where a last bit makes a difference: a bias before one has no gradient but rounding, and
# the statistics of the average, which MESA learns from, are those of the process.
LAMB = {
    **{"model": "vmamba_tiny", "optimizer": "lamb", "layer_decay": 0.8, "accumulation": 2},
    **{"average_decay": 0.0, "checkpoint_gradients": True},
}
BF16 = {"model": "vmamba_tiny", "precision": "bf16", "mesa": 1.0, "mesa_start": 0.0}


@pytest.mark.parametrize("changed", [{}, LAMB, BF16], ids=["adamw", "lamb", "bf16"])
def test_a_sharded_run_learns_what_a_whole_one_learns(tmp_path, changed):
    options = replace(OPTIONS, **changed)
    for name in ("whole", "sharded"):
        finish(launch(replace(options, shard=name == "sharded"), tmp_path / name))
    whole, sharded = (read_rows(tmp_path / name / "metrics.csv") for name in ("whole", "sharded"))
    for one, two in zip(whole, sharded, strict=True):
        for key in ("loss", "gradient_norm", "validation_loss"):
            assert two[key] == pytest.approx(one[key], abs=1e-4)
    one, two = (load_checkpoint(tmp_path / name / LAST) for name in ("whole", "sharded"))
    for key in ("network", "average"):
        for name in one[key] or ():
            torch.testing.assert_close(two[key][name], one[key][name], atol=1e-4, rtol=1e-3)
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for index, entry in one["optimizer"]["state"].items():
        for name, value in entry.items():
            assert two["optimizer"]["state"][index][name].shape == value.shape
    # anyone can use what it wrote
    facts = read_trained(tmp_path / "sharded" / BEST)
    assert load_trained(tmp_path / "sharded" / BEST, facts)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_sharded_run_that_is_killed_resumes_to_the_same_weights(tmp_path):
    options = replace(OPTIONS, shard=True, epochs=6)
    finish(launch(options, tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = launch(options, killed)
    while not (killed / LAST).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()
    process.communicate()
    assert load_checkpoint(killed / LAST)["step"] < 24
    finish(launch(options, killed, "--resume"))
    one, two = (load_checkpoint(folder / LAST) for folder in (tmp_path / "whole", killed))
    for key in ("network", "average"):
        torch.testing.assert_close(two[key], one[key], atol=0, rtol=0)
    assert (killed / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_shards_need_processes(tmp_path):
    with pytest.raises(ValueError, match="launch several with torchrun"):
        train(replace(OPTIONS, shard=True), tmp_path / "run")


def test_shards_in_float16_are_refused():
    with pytest.raises(ValueError, match="shard=true goes with precision bf16 or no"):
        replace(OPTIONS, shard=True, precision="fp16")


def test_a_forecast_counts_shards_and_whole_copies():
    run = Run(OPTIONS, None)
    weights = 4 * sum(p.numel() for p in run.plain.parameters())
    assert state_bytes(run) == 5 * weights
    with mock.patch.object(type(run.accelerator), "num_processes", 4):
        # weights, gradients and two moments in four parts; a copy that follows, and the average
        assert state_bytes(run, sharded=True) == 3 * weights
