"""Speed and memory of training steps of several models, by the same code, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .data import SYNTHETIC
from .fitting import Run
from .forecasting import kept_bytes, state_bytes
from .options import ClassifierOptions


@dataclass(frozen=True)
class Throughput:
    """Of one model: pictures a second in each timed step, and bytes, measured on a GPU, by estimate elsewhere."""

    model: str
    parameters: int
    pictures_per_second: tuple[float, ...]
    memory: int

    @property
    def median(self) -> float:
        return statistics.median(self.pictures_per_second)


def throughput(options: ClassifierOptions, peers: Sequence[str], steps: int = 10, warm_up: int = 3) -> list[Throughput]:
    """Train `options.model` and peers on noise already on the device, in turns, so that a disturbance meets them alike.

    Args:
        options: peers take all but the model's own arguments, weights and distillation.
        peers: names registered with timm.
        steps, warm_up: how many are timed, and made before.
    """
    noise = replace(options, data=SYNTHETIC, dataset="", num_classes=0, weights="", epochs=10**4, steps_per_epoch=10)
    plain = {"model_arguments": {}, "distillation": "none", "teacher": ""}
    runs, memory = [], []
    for variant in (noise, *(replace(noise, model=peer, **plain) for peer in peers)):
        cuda = not options.cpu and torch.cuda.is_available()
        before = torch.cuda.memory_allocated() if cuda else 0
        run = Run(variant, None)
        device, side = run.accelerator.device, options.image_size
        images = torch.randn(options.batch_size, 3, side, side, device=device)
        batch = images, torch.randint(run.arguments["num_classes"], (options.batch_size,), device=device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            _step(run, batch)
            memory.append(torch.cuda.max_memory_allocated() - before)
        else:
            memory.append(state_bytes(run) + kept_bytes(run, batch))
        runs.append((run, batch))
    speeds: list[list[float]] = [[] for _ in runs]
    for turn in range(warm_up + steps):
        for (run, batch), found in zip(runs, speeds, strict=True):
            seconds = _step(run, batch)
            if turn >= warm_up:
                found.append(run.pictures_per_step / seconds)
    return [
        Throughput(run.options.model, sum(p.numel() for p in run.plain.parameters()), tuple(found), used)
        for (run, _), found, used in zip(runs, speeds, memory, strict=True)
    ]


def _step(run: Run, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Seconds of a step; it waits for the device, since it reads the loss."""
    images, targets = batch
    begun = time.perf_counter()
    # mixing changes the pictures
    run.train_step(iter([(images.clone(), targets)] * run.options.accumulation))
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
