"""What a dataset looks like: sizes, spacings and intensities, measured once and kept in a readable file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from ..volumes.errors import VolumeError
from ..volumes.writing import atomic_file
from .datasets import Case, Dataset
from .loading import LoadedCase, load_case

# labelled voxels whose intensities are looked at in each case, spread evenly over them
_SAMPLES = 10_000


@dataclass(frozen=True)
class Fingerprint:
    """Measurements of a dataset; axes in the order right, front, top (pictures: rows, columns, 1).

    Attributes:
        shapes: (cases, 3) voxels.
        spacings: (cases, 3) mm; 1 for pictures.
        mean, std, low, high: of each channel over labelled voxels (pictures: all pixels) of all cases; low and high are
            the percentiles 0.5 and 99.5.
        zero_share: median share of the voxels in which every channel is zero.
        label_cases: how many cases hold each label.
    """

    shapes: list[list[int]]
    spacings: list[list[float]]
    mean: list[float]
    std: list[float]
    low: list[float]
    high: list[float]
    zero_share: float
    label_cases: list[int]


def take_fingerprint(
    dataset: Dataset, progress: Callable[[Iterable[Case]], Iterable[Case]] = lambda cases: cases
) -> Fingerprint:
    """Read every case of a dataset, which checks them all, and measure it.

    Args:
        progress: wraps the cases, for a progress bar.

    Raises:
        VolumeError: a case cannot be used (see `load_case`), or nothing is labelled in any of them.
    """
    shapes, spacings, zero_shares, samples = [], [], [], []
    label_cases = np.zeros(len(dataset.labels), int)
    for case in progress(dataset.cases):
        loaded = load_case(case, dataset)
        shape, spacing = _canonical(loaded)
        shapes.append(shape)
        spacings.append(spacing)
        zero_shares.append(float((loaded.image == 0).all(axis=0).mean()))
        label_cases[np.unique(loaded.labels)] += 1
        # colours mean the same everywhere, grey values of a scan's background depend on the field of view
        counted = np.ones_like(loaded.labels, bool) if case.is_picture else loaded.labels > 0
        labelled = loaded.image[:, counted]
        if labelled.shape[1]:
            chosen = np.linspace(0, labelled.shape[1] - 1, min(_SAMPLES, labelled.shape[1])).round().astype(int)
            samples.append(labelled[:, chosen])
    if not label_cases[1:].any():
        raise VolumeError(f"dataset {dataset.name}: the label maps hold background only; label something")
    values = np.concatenate(samples, axis=1).astype(np.float64)
    low, high = np.percentile(values, (0.5, 99.5), axis=1).tolist()
    mean, std = values.mean(axis=1).tolist(), values.std(axis=1).tolist()
    zero_share = float(np.median(zero_shares))
    return Fingerprint(shapes, spacings, mean, std, low, high, zero_share, label_cases.tolist())


def write_fingerprint(fingerprint: Fingerprint, path: Path) -> None:
    """Write it as JSON."""
    with atomic_file(path) as stream:
        stream.write(json.dumps(dataclasses.asdict(fingerprint), indent=1).encode() + b"\n")


def _canonical(loaded: LoadedCase) -> tuple[list[int], list[float]]:
    """Shape and spacing with the axes in the order of RAS."""
    order = np.argsort(nibabel.io_orientation(loaded.affine)[:, 0])
    spacing = np.linalg.norm(loaded.affine[:3, :3], axis=0)
    return [loaded.labels.shape[axis] for axis in order], spacing[order].tolist()
