"""Cases on the grid and with the intensities that the network sees, kept on disk so that a patch is read alone.

The steps are data in the language of MONAI bundles, so that an exported bundle does exactly the same.
Letters: C is the channels, X, Y, Z the voxels of the prepared case.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import monai.transforms
import numpy as np
import torch
from monai.data import MetaTensor

from .datasets import Case, Dataset
from .loading import load_case
from .planning import Plan

# voxels of each label that patches may be centred on
_CENTRES = 10_000


@dataclass(frozen=True)
class PreparedCase:
    """A case in the cache; its arrays are read from disk on demand, piece by piece."""

    name: str
    folder: Path

    @cached_property
    def image(self) -> np.ndarray:
        """(C, X, Y, Z) float32, mapped from disk."""
        return np.load(self.folder / "image.npy", mmap_mode="r")

    @cached_property
    def labels(self) -> np.ndarray:
        """(X, Y, Z) uint8 or uint16, mapped from disk."""
        return np.load(self.folder / "labels.npy", mmap_mode="r")

    @cached_property
    def centres(self) -> dict[int, np.ndarray]:
        """Label -> (n, 3) voxels with it, for the labels of this case but the background."""
        with np.load(self.folder / "centres.npz") as stored:
            return {int(label): stored[label] for label in stored}


def preprocessing_steps(plan: Plan, pictures: bool) -> list[dict[str, Any]]:
    """The deterministic transforms of the image, as entries of a bundle's `preprocessing`."""
    image = {"keys": "image"}
    size = [side or -1 for side in plan.resize]
    grid = [{"_target_": "Resized", **image, "spatial_size": size, "mode": "trilinear"}] if any(plan.resize) else []
    if pictures:
        spatial = grid
    else:
        resampled = {"_target_": "Spacingd", **image, "pixdim": plan.spacing, "mode": "bilinear"}
        spatial = [{"_target_": "Orientationd", **image, "axcodes": "RAS", "labels": None}, *(grid or [resampled])]
    if plan.normalisation == "ct":
        mean, std = plan.intensity_mean[0], max(plan.intensity_std[0], 1e-8)
        low, high = plan.intensity_low[0], plan.intensity_high[0]
        scaled = {"a_min": low, "a_max": high, "b_min": (low - mean) / std, "b_max": (high - mean) / std}
        return [*spatial, {"_target_": "ScaleIntensityRanged", **image, **scaled, "clip": True}]
    if plan.normalisation == "dataset":
        known = {"subtrahend": plan.intensity_mean, "divisor": [max(std, 1e-8) for std in plan.intensity_std]}
        return [*spatial, {"_target_": "NormalizeIntensityd", **image, **known, "channel_wise": True}]
    nonzero = plan.normalisation == "zscore_nonzero"
    return [*spatial, {"_target_": "NormalizeIntensityd", **image, "nonzero": nonzero, "channel_wise": True}]


def prepare_cases(
    cases: Iterable[Case],
    dataset: Dataset,
    plan: Plan,
    folder: Path,
    progress: Callable[[list[Case]], Iterable[Case]] = lambda cases: cases,
) -> list[PreparedCase]:
    """Prepare the cases that `folder` does not hold yet, with these steps and from these very files.

    Raises:
        VolumeError: a case cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = preprocessing_steps(plan, dataset.is_pictures)
    image_transform = _build(steps)
    label_transform = _build(
        [
            step | ({"mode": "nearest"} if "mode" in step else {})
            for step in steps
            if "mode" in step or "axcodes" in step
        ]
    )
    prepared = []
    for case in progress(list(cases)):
        target = folder / f"{case.name}-{_digest(case, steps, dataset)}"
        if not target.is_dir():
            _prepare(case, dataset, image_transform, label_transform, target)
        prepared.append(PreparedCase(case.name, target))
    return prepared


def _build(steps: list[dict[str, Any]]) -> monai.transforms.Compose:
    built = []
    for step in steps:
        arguments = {key: value for key, value in step.items() if key != "_target_"}
        built.append(getattr(monai.transforms, step["_target_"])(**arguments))
    return monai.transforms.Compose(built)


def _digest(case: Case, steps: list[dict[str, Any]], dataset: Dataset) -> str:
    """Of everything the prepared case depends on; the contents of files are known by size and time."""
    files = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*case.images, case.labels)
    ]
    known = json.dumps([files, steps, len(dataset.labels), len(dataset.channels)])
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _prepare(case: Case, dataset: Dataset, image_transform: Any, label_transform: Any, target: Path) -> None:
    loaded = load_case(case, dataset)
    affine = torch.from_numpy(loaded.affine)
    image = image_transform({"image": MetaTensor(torch.from_numpy(loaded.image), affine=affine)})["image"]
    # float32 holds every label exactly
    labels = MetaTensor(torch.from_numpy(loaded.labels[None].astype(np.float32)), affine=affine)
    labels = label_transform({"image": labels})["image"]
    numbers = labels[0].round().numpy().astype(np.uint8 if len(dataset.labels) <= 256 else np.uint16)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        np.save(partial / "image.npy", image.numpy().astype(np.float32, copy=False))
        np.save(partial / "labels.npy", numbers)
        np.savez(partial / "centres.npz", **_centres(numbers))
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _centres(labels: np.ndarray) -> dict[str, np.ndarray]:
    centres = {}
    for label in np.unique(labels[labels > 0]):
        voxels = np.argwhere(labels == label).astype(np.int32)
        if len(voxels) > _CENTRES:
            voxels = voxels[np.linspace(0, len(voxels) - 1, _CENTRES).round().astype(int)]
        centres[str(label)] = voxels
    return centres
