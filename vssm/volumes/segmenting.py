"""From a file to a file: read, predict, write, and count what was found."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import default_bundle_path, find_bundle, load_bundle
from .predicting import mismatches, predict_volume
from .reading import SUFFIXES, read_volume
from .writing import check_output, write_labels


@dataclass(frozen=True)
class Segment:
    """One label of a result: its number, its name, how many voxels have it, and their volume in millilitres."""

    label: int
    name: str
    voxels: int
    millilitres: float


@dataclass(frozen=True)
class Segmentation:
    """What `segment_file` wrote: the segments without the background, and what the reader should know."""

    segments: tuple[Segment, ...]
    notes: tuple[str, ...]


def segment_file(
    image: str | Path,
    output: str | Path,
    *,
    bundle: str | Path | None = None,
    device: str = "auto",
    overlap: float | None = None,
    overlay: str | Path | None = None,
    progress: bool = False,
) -> Segmentation:
    """Segment the volume `image` with a bundle and write its label map to `output`.

    Args:
        image: .nii or .nii.gz file.
        output: .nii or .nii.gz file, replaced if it exists, with the exact grid of `image`.
        bundle: folder of a MONAI bundle, or the name of one that ships with vssm; its default one if None.
        device, overlap, progress: see `predict_volume`.
        overlay: .png file for a picture of three planes, or None.

    Raises:
        VolumeError: one sentence; the label map is then as it was before, unless only the picture failed.
    """
    image = Path(image)
    check_output(output, SUFFIXES, (image,))
    if overlay is not None:
        # found missing before the work, not after it
        from .overlay import draw_overlay

        check_output(overlay, (".png",))
    volume = read_volume(image)
    loaded = load_bundle(default_bundle_path() if bundle is None else find_bundle(bundle))
    notes = (*volume.notes, *mismatches(volume, loaded))
    labels = predict_volume(volume, loaded, device=device, overlap=overlap, progress=progress)
    write_labels(labels, volume, output)
    if overlay is not None:
        draw_overlay(volume.voxels, labels, volume.affine, loaded.labels, Path(overlay))
    counts = np.bincount(labels.ravel(), minlength=len(loaded.labels))
    millilitres = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    segments = tuple(
        Segment(label, name, int(counts[label]), float(counts[label] * millilitres))
        for label, name in enumerate(loaded.labels)
        if label > 0
    )
    return Segmentation(segments, notes)
