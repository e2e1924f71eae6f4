"""The plan of a run: read from its folder, or made from the data and written there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..machine import available_memory
from .datasets import Dataset, read_dataset
from .fingerprint import Fingerprint, take_fingerprint, write_fingerprint
from .options import TrainingOptions
from .planning import Plan, check_plan, make_plan, read_plan, write_plan

# of the free memory, for weights, optimizer, caches of kernels and what other processes take meanwhile
_SHARE = 0.6
# a planned patch need not use all of a large machine: nnU-Net's default is a card of 8 GB
_PLANNED_GB = 8.0


def obtain_plan(
    options: TrainingOptions,
    dataset: Dataset,
    output: Path,
    device: torch.device,
    progress: Callable[[Iterable], Iterable] = lambda cases: cases,
) -> Plan:
    """The plan in `output`/plan.yaml, or a new one, written there beside fingerprint.json.

    Raises:
        VolumeError, ValueError: a case or the plan cannot be used.
    """
    path = output / "plan.yaml"
    if path.exists():
        return read_plan(path, dataset)
    fingerprint = take_fingerprint(dataset, progress)
    if options.resize or options.spacing:
        fingerprint = _on_grid(fingerprint, options)
    memory = options.memory_gb * 1e9
    if memory == 0:
        memory = min(_PLANNED_GB * 1e9, device_memory(device) or _PLANNED_GB * 1e9)
    plan = make_plan(
        fingerprint, dataset, int(memory), options.precision, options.flat, options.patch_size, options.batch_size
    )
    if options.resize:
        plan = dataclasses.replace(plan, resize=options.resize)
    if options.normalisation != "planned":
        plan = dataclasses.replace(plan, normalisation=options.normalisation)
    check_plan(plan, dataset)
    write_fingerprint(fingerprint, output / "fingerprint.json")
    write_plan(plan, path)
    return plan


def _on_grid(fingerprint: Fingerprint, options: TrainingOptions) -> Fingerprint:
    """The same data set with the sizes and spacings that the options ask for."""
    shapes, spacings = [], []
    for shape, spacing in zip(fingerprint.shapes, fingerprint.spacings, strict=True):
        extent = [n * mm for n, mm in zip(shape, spacing, strict=True)]
        if options.resize:
            shapes.append([new or old for new, old in zip(options.resize, shape, strict=True)])
            spacings.append([mm / n for mm, n in zip(extent, shapes[-1], strict=True)])
        else:
            shapes.append([max(1, round(mm / new)) for mm, new in zip(extent, options.spacing, strict=True)])
            spacings.append(options.spacing)
    return dataclasses.replace(fingerprint, shapes=shapes, spacings=spacings)


def plan_only(
    options: TrainingOptions, output: Path, progress: Callable[[Iterable], Iterable] = lambda cases: cases
) -> Path:
    """Read all cases and write `output`/plan.yaml, for editing before the run.

    Raises:
        VolumeError, ValueError: as `obtain_plan`.
    """
    dataset = read_dataset(options.data, options.channels, options.labels, options.label_suffix)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    obtain_plan(options, dataset, output, device, progress)
    return output / "plan.yaml"


def device_memory(device: torch.device) -> int | None:
    """Bytes of a device that training may plan with, or None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _SHARE) if free else None
    available = available_memory()
    return None if available is None else int(available * _SHARE)
