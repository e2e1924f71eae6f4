"""Reading one case completely: channels and labels on one grid, checked against what the dataset says of them.

Letters: C is the channels, X, Y, Z the stored voxels; a picture has Z = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..volumes.errors import VolumeError
from ..volumes.evaluation import check_same_grid, read_labels
from ..volumes.reading import read_volume
from .datasets import Case, Dataset

_REMEDY = "resample the one to the grid of the other"


@dataclass(frozen=True)
class LoadedCase:
    """Image (C, X, Y, Z) float32, labels (X, Y, Z) int32, and the affine from voxels to mm (RAS+)."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


def load_case(case: Case, dataset: Dataset) -> LoadedCase:
    """Read a case.

    Raises:
        VolumeError: a file is damaged, the grids differ, the number of channels is not the dataset's, or a label value
            is not among the dataset's labels.
    """
    loaded = _load_picture(case, dataset) if case.is_picture else _load_volume(case)
    if len(loaded.image) != len(dataset.channels):
        raise VolumeError(
            f"{case.images[0]}: case {case.name} has {len(loaded.image)} channels, the dataset "
            f"{len(dataset.channels)} ({', '.join(dataset.channels)}); correct the files or the list of channels"
        )
    largest = int(loaded.labels.max())
    if largest >= len(dataset.labels):
        raise VolumeError(
            f"{case.labels}: holds the label {largest}, the dataset names 0 to {len(dataset.labels) - 1}; "
            "correct the label map or name the label"
        )
    return loaded


def _load_volume(case: Case) -> LoadedCase:
    labels = read_volume(case.labels)
    channels = []
    for path in case.images:
        volume = read_volume(path)
        check_same_grid(volume, labels, _REMEDY)
        channels.append(volume.voxels)
    return LoadedCase(np.stack(channels), read_labels(labels), labels.affine)


def _load_picture(case: Case, dataset: Dataset) -> LoadedCase:
    pictures = [_read_picture(path) for path in case.images]
    labels = _read_picture(case.labels)
    if len(labels) != 1 and (labels != labels[:1]).any():
        raise VolumeError(f"{case.labels}: is a coloured picture; save the label of each pixel as its grey value")
    for path, picture in zip(case.images, pictures, strict=True):
        if picture.shape[1:] != labels.shape[1:]:
            raise VolumeError(
                f"{path} has {picture.shape[1:3]} pixels and {case.labels} {labels.shape[1:3]}; {_REMEDY}"
            )
    label = labels[0].astype(np.int32)
    # masks of one object are commonly stored as black and white
    if len(dataset.labels) == 2 and set(np.unique(label)) <= {0, 255}:
        label //= 255
    return LoadedCase(np.concatenate(pictures), label, np.eye(4))


def _read_picture(path: Path) -> np.ndarray:
    """(C, rows, columns, 1) float32, values as stored."""
    try:
        with Image.open(path) as picture:
            if picture.mode in ("P", "RGBA", "CMYK", "YCbCr"):
                picture = picture.convert("RGB")
            pixels = np.asarray(picture, np.float32)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise VolumeError(f"{path}: cannot be read as a picture ({error}); get the file again") from None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return np.moveaxis(pixels, -1, 0)[..., None]
