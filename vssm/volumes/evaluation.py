"""How well label maps agree with a reference: overlap, surface distance in mm, volume in ml, lesions.

Conventions where masks are empty, for a label in one case:
- in neither: the label is not rated there (NaN, left out of every summary);
- in one only: Dice, surface Dice and lesion F1 are 0, the Hausdorff distance is infinite; summaries of the distance
  give the median, which an infinite value moves but does not destroy, and say how many were infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage, stats

from .cases import case_name
from .errors import VolumeError
from .reading import Volume, read_volume

METRICS = ("dice", "surface_dice", "hausdorff95_mm", "volume_difference_ml", "lesion_f1")
_RESAMPLES = 2000
# Affines that place every corner of the volume within this distance describe the same grid.
_SAME_PLACE_MM = 0.1


@dataclass(frozen=True)
class Rating:
    """One label in one case.

    Attributes:
        case: name of the file without its ending.
        label: value in the label maps.
        name: of the label.
        dice: 2 |P and R| / (|P| + |R|).
        surface_dice: share of both surfaces that lies within the tolerance of the other (Nikolov et al., arXiv
            1809.04430, on voxel edges as MONAI computes it).
        hausdorff95_mm: 95th percentile of the distances between the surfaces, the larger of both directions.
        volume_difference_ml: predicted minus reference volume.
        lesion_f1: 2 TP / (2 TP + FP + FN) over connected components (faces, edges and corners connect): a reference
            component that the prediction touches is found (TP), a predicted one that touches none is false (FP).
        reference_ml: volume in the reference.
        predicted_ml: volume in the prediction.
    """

    case: str
    label: int
    name: str
    dice: float
    surface_dice: float
    hausdorff95_mm: float
    volume_difference_ml: float
    lesion_f1: float
    reference_ml: float
    predicted_ml: float


@dataclass(frozen=True)
class Summary:
    """One metric of one label over the cases in which it was rated.

    Attributes:
        cases: how many cases count.
        mean: NaN if a value is infinite.
        median: of all values, infinite ones included.
        low, high: 95 % bootstrap interval of the mean (percentile method), NaN for fewer than two cases or infinite
            values.
        infinite: how many values are infinite.
    """

    label: int
    name: str
    metric: str
    cases: int
    mean: float
    median: float
    low: float
    high: float
    infinite: int


def evaluate_files(
    predicted: str | Path,
    reference: str | Path,
    tolerance_mm: float = 2.0,
    names: Mapping[int, str] | None = None,
) -> list[Rating]:
    """Rate one predicted label map against its reference.

    Args:
        predicted, reference: NIfTI files of integer labels on the same grid; 0 is the background.
        tolerance_mm: distance up to which surfaces count as agreeing.
        names: label value -> name; labels that it lists are rated even if absent here, others are called "label 3".

    Returns:
        a rating for every label in either map or in `names`, sorted by label.

    Raises:
        VolumeError: a file cannot be read, holds something else than labels, or the grids differ.
        ValueError: a tolerance that is negative or not finite.
    """
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"tolerance_mm is {tolerance_mm}; it must be a distance in mm, 0 or more")
    volumes = read_volume(predicted), read_volume(reference)
    check_same_grid(*volumes)
    maps = [read_labels(volume) for volume in volumes]
    names = dict(names or {})
    case = case_name(volumes[1].path)
    voxel_ml = abs(np.linalg.det(volumes[1].affine[:3, :3])) / 1000
    spacing = volumes[1].spacing
    labels = sorted({*names, *np.unique(maps[0]).tolist(), *np.unique(maps[1]).tolist()} - {0})
    ratings = []
    for label in labels:
        masks = [labelled == label for labelled in maps]
        name = names.get(label, f"label {label}")
        ratings.append(_rate(case, label, name, *masks, spacing, voxel_ml, tolerance_mm))
    return ratings


def pair_files(predicted: str | Path, reference: str | Path) -> list[tuple[Path, Path]]:
    """Predictions and references that belong together: two files, or the files of two folders with equal names.

    Raises:
        VolumeError: a folder without volumes, one path a folder and the other a file, or a reference without a
            prediction; predictions without a reference are allowed only if none of the references lacks one.
    """
    predicted, reference = Path(predicted), Path(reference)
    for path in (predicted, reference):
        if not path.exists():
            raise VolumeError(f"{path}: no such file or folder; check the name")
    if predicted.is_dir() != reference.is_dir():
        raise VolumeError(f"{predicted} and {reference}: give two files or two folders")
    if not predicted.is_dir():
        return [(predicted, reference)]
    found, wanted = _volumes_in(predicted), _volumes_in(reference)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise VolumeError(
            f"{predicted}: no prediction for {', '.join(missing[:5])}{more}; give predictions the references' names"
        )
    return [(found[case], path) for case, path in sorted(wanted.items())]


def summarise(ratings: Sequence[Rating]) -> list[Summary]:
    """Mean, median and bootstrap interval of every metric, per label, over the cases in which the label occurs."""
    summaries = []
    for label, name in sorted({(rating.label, rating.name) for rating in ratings}):
        rows = [rating for rating in ratings if (rating.label, rating.name) == (label, name)]
        for metric in METRICS:
            values = np.array([getattr(row, metric) for row in rows])
            summaries.append(_summary(label, name, metric, values[~np.isnan(values)]))
    return summaries


def _rate(
    case: str,
    label: int,
    name: str,
    predicted: np.ndarray,
    reference: np.ndarray,
    spacing: np.ndarray,
    voxel_ml: float,
    tolerance_mm: float,
) -> Rating:
    sizes = int(predicted.sum()), int(reference.sum())
    volumes_ml = {"reference_ml": sizes[1] * voxel_ml, "predicted_ml": sizes[0] * voxel_ml}
    difference = (sizes[0] - sizes[1]) * voxel_ml
    if not any(sizes):
        nothing = dict.fromkeys(METRICS, float("nan"))
        return Rating(case, label, name, **nothing, **volumes_ml)
    if not all(sizes):
        return Rating(case, label, name, 0.0, 0.0, float("inf"), difference, 0.0, **volumes_ml)
    dice = 2 * int((predicted & reference).sum()) / sum(sizes)
    # Nothing outside the common box, with a margin for the surfaces, matters to the distances.
    box = tuple(
        slice(max(part.start - 2, 0), part.stop + 2)
        for part in ndimage.find_objects((predicted | reference).astype(np.uint8))[0]
    )
    one_hot = [torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (predicted, reference)]
    millimetres = spacing.tolist()
    surface = compute_surface_dice(*one_hot, [tolerance_mm], include_background=True, spacing=millimetres)
    distance = compute_hausdorff_distance(*one_hot, include_background=True, percentile=95, spacing=millimetres)
    lesions = _lesion_f1(predicted[box], reference[box])
    return Rating(case, label, name, dice, surface.item(), distance.item(), difference, lesions, **volumes_ml)


def _lesion_f1(predicted: np.ndarray, reference: np.ndarray) -> float:
    connected = np.ones((3,) * predicted.ndim)
    found, false = ndimage.label(reference, connected), ndimage.label(predicted, connected)
    touched = len(np.unique(found[0][predicted & reference]))
    spurious = false[1] - len(np.unique(false[0][predicted & reference]))
    return 2 * touched / (2 * touched + spurious + found[1] - touched)


def _summary(label: int, name: str, metric: str, values: np.ndarray) -> Summary:
    infinite = int(np.isinf(values).sum())
    nan = float("nan")
    if len(values) == 0:
        return Summary(label, name, metric, 0, nan, nan, nan, nan, 0)
    mean = nan if infinite else float(values.mean())
    low = high = nan
    if len(values) > 1 and not infinite:
        low = high = mean
        if np.ptp(values) > 0:
            interval = stats.bootstrap(
                (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
    return Summary(label, name, metric, len(values), mean, float(np.median(values)), low, high, infinite)


def read_labels(volume: Volume) -> np.ndarray:
    """The voxels (X, Y, Z) as int32 labels.

    Raises:
        VolumeError: they are not whole numbers from 0 to 65535.
    """
    rounded = np.rint(volume.voxels)
    if not np.array_equal(rounded, volume.voxels) or rounded.min() < 0 or rounded.max() > 65535:
        raise VolumeError(
            f"{volume.path}: holds values that are no labels (whole numbers from 0 to 65535); is it an image or a "
            "probability map?"
        )
    return rounded.astype(np.int32)


def check_same_grid(
    predicted: Volume, reference: Volume, remedy: str = "resample the prediction to the reference's grid"
) -> None:
    """Raise VolumeError, ending in `remedy`, unless both have the same voxels at the same places."""
    shapes = predicted.voxels.shape, reference.voxels.shape
    if shapes[0] != shapes[1]:
        raise VolumeError(f"{predicted.path} has {shapes[0]} voxels and {reference.path} {shapes[1]}; {remedy}")
    corners = np.array(np.meshgrid(*([0, size - 1] for size in shapes[0]), [1], indexing="ij")).reshape(4, -1)
    apart = np.linalg.norm(((predicted.affine - reference.affine) @ corners)[:3], axis=0).max()
    if apart > _SAME_PLACE_MM:
        raise VolumeError(f"{predicted.path} and {reference.path} lie {apart:.3g} mm apart in space; {remedy}")


def _volumes_in(folder: Path) -> dict[str, Path]:
    found = {case_name(path): path for path in sorted(folder.iterdir()) if path.name.endswith((".nii", ".nii.gz"))}
    if not found:
        raise VolumeError(f"{folder}: holds no .nii or .nii.gz file")
    return found
