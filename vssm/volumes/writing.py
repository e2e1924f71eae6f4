"""Writing results whole or not at all, and label maps on exactly the grid of the volume they belong to."""

import errno
import gzip
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np

from ..atomic import replaced_file
from .errors import VolumeError
from .reading import SUFFIXES, Volume

# the header fields that say where the voxels lie; nothing else of the input is copied, names and remarks least of all
_GEOMETRY_FIELDS = (
    "dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def check_output(path: str | Path, suffixes: tuple[str, ...], inputs: tuple[Path, ...] = ()) -> Path:
    """Check before any work that `path` can be written, and return it.

    Raises:
        VolumeError: wrong ending, missing or unwritable folder, a folder or device of that name, or one of `inputs`.
    """
    path = Path(path)
    try:
        _check_output(path, suffixes, inputs)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written ({error.strerror or error}); choose another name") from None
    return path


def _check_output(path: Path, suffixes: tuple[str, ...], inputs: tuple[Path, ...]) -> None:
    if not path.name.lower().endswith(suffixes):
        raise VolumeError(f"{path}: the result must be named {' or '.join(suffixes)}; change the name")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise VolumeError(f"{path}: the folder {folder} does not exist; create it first")
    if path.exists() and not path.is_file():
        raise VolumeError(f"{path}: exists and is not an ordinary file; choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VolumeError(f"{path}: the folder {folder} cannot be written to; choose another one")
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise VolumeError(f"{path}: is the input itself; choose another name for the result")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """`vssm.atomic.replaced_file` whose refusals by the system are errors for the user.

    Raises:
        VolumeError: no space, no permission, read-only.
    """
    try:
        with replaced_file(path) as stream:
            yield stream
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        raise VolumeError(f"{path}: cannot be written ({error.strerror or error}); {remedy} and run again") from None


def write_labels(labels: np.ndarray, volume: Volume, path: str | Path, description: str = "label map by vssm") -> None:
    """Write a label map with the exact shape, affine, qform, sform, codes and units of `volume`.

    An existing file is replaced. The same labels always give the same bytes.

    Args:
        labels: (X, Y, Z) uint8 on the grid of `volume`.
        volume: the volume that was segmented.
        path: .nii or .nii.gz.
        description: for the header's `descrip`, at most 79 ASCII characters.

    Raises:
        VolumeError: if the file cannot be written.
        ValueError: if `labels` is not uint8 of the volume's shape.
    """
    if labels.dtype != np.uint8 or labels.shape != volume.voxels.shape:
        raise ValueError(f"labels must be uint8 of shape {volume.voxels.shape}, got {labels.dtype} {labels.shape}")
    path = check_output(path, SUFFIXES, (volume.path,))
    single = nibabel.Nifti2Image if isinstance(volume.header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    header = single.header_class()
    for field in _GEOMETRY_FIELDS:
        header[field] = volume.header[field]
    header.set_data_dtype(np.uint8)
    header["descrip"] = description.encode("ascii")
    # without an affine nibabel leaves qform and sform of the header alone
    image = single(labels.reshape(header.get_data_shape(), order="F"), None, header)
    with atomic_file(path) as stream:
        if path.suffix.lower() == ".gz":
            # no name and no time in the file: equal labels, equal bytes
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=stream, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(stream)


def write_probabilities(
    probabilities: np.ndarray, volume: Volume, names: tuple[str, ...], path: str | Path, description: str
) -> None:
    """Write the probability of every label at every voxel: a compressed .npz, since NIfTI knows no 16-bit floats.

    `numpy.load(path)` gives `probabilities` (K, X, Y, Z) float16, `affine` (4, 4) float64 from voxel index to mm in
    RAS+, `labels`, the K names with the background's first, and `description`. An existing file is replaced.

    Args:
        probabilities: (K, X, Y, Z) float16 on the grid of `volume`, in memory or mapped.
        volume: the volume that was segmented.
        names: name of each label.
        path: .npz.
        description: what made it.

    Raises:
        VolumeError: if the file cannot be written.
        ValueError: if `probabilities` is not float16 of that shape.
    """
    expected = (len(names), *volume.voxels.shape)
    if probabilities.dtype != np.float16 or probabilities.shape != expected:
        raise ValueError(
            f"probabilities must be float16 of shape {expected}, got {probabilities.dtype} {probabilities.shape}"
        )
    with atomic_file(check_output(path, (".npz",))) as stream:
        np.savez_compressed(
            stream,
            probabilities=probabilities,
            affine=volume.affine,
            labels=np.array(names),
            description=np.array(description),
        )


def read_description(path: Path) -> str | None:
    """What made a file of `write_probabilities`; None if there is no such file or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return str(content["description"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
