"""What a training run will be, need and take, from a few small steps of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..complexity import complexity
from ..machine import available_memory
from .fitting import Run

# pictures of the two trials on a CPU, whose difference is what one more costs
_TRIAL = (2, 4)
_REPEATS = 3


@dataclass(frozen=True)
class Forecast:
    """Figures of a run.

    Attributes:
        parameters, gflops: of the network, as the papers count.
        classes, training, validation: how many classes and pictures.
        steps_per_epoch, pictures_per_step: of all processes.
        rate: the highest learning rate.
        state_bytes: of weights, gradients, optimizer and average on a device.
        activation_bytes: kept for the backward pass of a batch on a device.
        available_bytes: of the device, None where unknown.
        step_seconds: of one step, with one picture's time extrapolated from a few.
        trial: pictures of the largest step that was measured.
    """

    parameters: int
    gflops: float
    classes: int
    training: int
    validation: int
    steps_per_epoch: int
    pictures_per_step: int
    rate: float
    state_bytes: int
    activation_bytes: int
    available_bytes: int | None
    step_seconds: float
    trial: int


def forecast(run: Run, sharded: bool = False) -> Forecast:
    """Measure a few small steps of `run` and extrapolate in proportion to the pictures; its state is spent by it.

    `run` must hold whole weights, though the one that is planned may be `sharded`: gathered ones would be counted as
    activations.
    Activations are the bytes of all tensors that autograd keeps, weights left out; what kernels need for a moment and
    the teacher's passes are not in them.
    """
    options, device = run.options, run.accelerator.device
    side = options.image_size
    counted = complexity(run.plain, (3, side, side))
    # timings follow one warm-up, whose kept tensors are counted
    kept, seconds = [], []
    for count in _TRIAL:
        batch = torch.randn(count, 3, side, side), torch.arange(count) % run.arguments["num_classes"]
        kept.append(kept_bytes(run, batch))
        seconds.append(min(_seconds(run, batch) for _ in range(_REPEATS)))
    more = _TRIAL[1] - _TRIAL[0]
    each = max(seconds[1] - seconds[0], 0.0) / more
    return Forecast(
        parameters=counted.parameters,
        gflops=counted.gflops,
        classes=run.arguments["num_classes"],
        training=len(run.loader.pictures),
        validation=run.held_out,
        steps_per_epoch=run.loader.steps,
        pictures_per_step=run.pictures_per_step,
        rate=run.rate,
        state_bytes=state_bytes(run, sharded),
        activation_bytes=kept[0] + (kept[1] - kept[0]) // more * (options.batch_size - _TRIAL[0]),
        available_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory(),
        step_seconds=(seconds[0] + each * (options.batch_size - _TRIAL[0])) * options.accumulation,
        trial=_TRIAL[1],
    )


def state_bytes(run: Run, sharded: bool = False) -> int:
    """Bytes of weights, gradients, the optimizer's state and the averaged network on a device."""
    weights = sum(p.numel() * p.element_size() for p in run.plain.parameters())
    split, whole = 2 + (1 if run.options.optimizer == "sgd" else 2), int(run.average is not None)
    if sharded:
        # the copy that follows the shards comes besides
        return weights * split // run.accelerator.num_processes + weights * (whole + 1)
    return weights * (split + whole)


def kept_bytes(run: Run, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes of the tensors that autograd keeps in a step of `run` on this batch, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in run.plain.parameters()}
    storages: dict[int, int] = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(look, lambda tensor: tensor):
        run.train_step(iter([batch] * run.options.accumulation))
    return sum(storages.values())


def _seconds(run: Run, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    begun = time.perf_counter()
    run.train_step(iter([batch] * run.options.accumulation))
    return (time.perf_counter() - begun) / run.options.accumulation


def as_lines(run: Run, found: Forecast) -> list[str]:
    """The forecast in words."""
    options, accelerator = run.options, run.accelerator
    memory = found.state_bytes + found.activation_bytes
    epoch = found.steps_per_epoch * found.step_seconds
    room = "" if found.available_bytes is None else f" of {found.available_bytes / 1e9:.1f} GB that are free"
    return [
        f"{options.model}: {found.parameters / 1e6:.2f} million parameters, {found.gflops:.2f} GFLOPs at "
        f"{options.image_size} x {options.image_size}",
        f"data: {found.training} pictures to train on, {found.validation} to validate, {found.classes} classes",
        f"steps: {found.steps_per_epoch} an epoch of {found.pictures_per_step} pictures, {run.last} in "
        f"{options.epochs} epochs; highest learning rate {found.rate:.3g}",
        f"processes: {accelerator.num_processes} on {accelerator.device}, precision {options.precision}",
        f"memory by estimate: {memory / 1e9:.2f} GB a device{room} (weights, gradients, optimizer, average "
        f"{found.state_bytes / 1e9:.2f} GB, activations {found.activation_bytes / 1e9:.2f} GB)",
        f"time by estimate, from steps of up to {found.trial} pictures without loading any: "
        f"{found.step_seconds:.3g} s a step, {_span(epoch)} an epoch, {_span(epoch * options.epochs)} in all, "
        "validation not counted",
    ]


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
