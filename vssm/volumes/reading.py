"""Reading NIfTI volumes so that a damaged file is refused and never read as something else.

Letters: X, Y, Z are the voxels along the three stored axes. An affine maps voxel indices to mm in RAS+ (x to the
patient's right, y to the front, z to the head).
"""

import gzip
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from .errors import VolumeError
from .memory import require_memory

SUFFIXES = (".nii", ".nii.gz")
_READ_STEP = 1 << 20
# deflate cannot expand a byte to more than 1032: a header that claims more than this lies about the file behind it
_GZIP_MAX_RATIO = 1100
_KNOWN_XFORM_CODES = range(6)
_UNIT_NAMES = {1: "metres", 3: "micrometres"}
# sform and qform that agree to this are rounded copies of each other (mm, at the corners of the volume)
_XFORM_TOLERANCE_MM = 0.1
# a nanometre and ten metres: beyond lies damage, and beyond float and int arithmetic of the grids
_SMALLEST_VOXEL_MM, _LARGEST_VOXEL_MM = 1e-6, 1e4
_SILENT = logging.Logger("vssm.volumes.header", level=logging.CRITICAL + 1)


@dataclass(frozen=True)
class Volume:
    """A volume as its file holds it.

    Attributes:
        path: the file.
        voxels: (X, Y, Z) float32, scaled by the header's slope and intercept, all finite.
        affine: (4, 4) float64, voxel index to mm in RAS+, finite and invertible.
        header: the NIfTI header (nibabel), which `write_labels` copies the geometry from.
        notes: what the reader should know although the file is usable, one sentence each.
    """

    path: Path
    voxels: np.ndarray
    affine: np.ndarray
    header: nibabel.Nifti1Header
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> np.ndarray:
        """(3,) distance between neighbouring voxels along each stored axis in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_volume(path: str | Path) -> Volume:
    """Read a .nii or .nii.gz file completely and check all of it.

    The header is checked, and the memory it asks for, before any voxel is read. Compressed files are read to their
    end, which verifies their checksum; a flipped bit in an uncompressed file's voxels cannot be seen by anybody. Which
    of sform and qform counts follows nibabel: the sform if it is set, else the qform, else the voxel sizes alone.

    Returns:
        Volume: voxels (X, Y, Z) float32.

    Raises:
        VolumeError: one sentence with the file name, what is wrong and what to do.
    """
    path = Path(path)
    try:
        _check_file(path)
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            header = _read_header(path, stream)
            raw = _read_voxels(path, stream, header)
    except MemoryError:
        raise VolumeError(f"{path}: does not fit into memory; crop the volume or use a larger machine") from None
    except PermissionError:
        raise VolumeError(f"{path}: may not be read by you; change its permissions") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError(f"{path}: cannot be unpacked ({error}); the file is damaged, get it again") from None
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror or error}); check the name and the disk") from None
    affine = _affine(path, header)
    voxels = _scale(path, raw, header)
    return Volume(path, voxels, affine, header, _notes(header, voxels, affine))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise VolumeError(f"{path}: is a folder; give a NIfTI file (for DICOM series, convert with dcm2niix first)")
    if not path.exists():
        raise VolumeError(f"{path}: no such file; check the name")
    if not path.is_file():
        raise VolumeError(f"{path}: is not an ordinary file; save the volume as .nii or .nii.gz first")
    if not path.name.lower().endswith(SUFFIXES):
        raise VolumeError(f"{path}: is not named .nii or .nii.gz; convert the volume to NIfTI first")
    if path.stat().st_size == 0:
        raise VolumeError(f"{path}: is empty; get the file again")


def _read_header(path: Path, stream: BinaryIO) -> nibabel.Nifti1Header:
    """Read and check everything but the affine; leaves `stream` behind the header's last byte."""
    start = stream.read(4)
    sizes = {header_class.sizeof_hdr: header_class for header_class in (nibabel.Nifti1Header, nibabel.Nifti2Header)}
    orders = {order: int.from_bytes(start, order) for order in ("little", "big")}
    order = next((order for order, size in orders.items() if size in sizes), None)
    if order is None:
        raise VolumeError(f"{path}: is not a NIfTI file (it does not start with a NIfTI header); convert it first")
    header_class = sizes[orders[order]]
    block = start + stream.read(header_class.sizeof_hdr - len(start))
    if len(block) < header_class.sizeof_hdr:
        raise VolumeError(f"{path}: ends after {len(block)} bytes, inside its header; get the file again")
    header = header_class(block, endianness="<" if order == "little" else ">", check=False)
    if header["magic"].item() != header_class.single_magic:
        raise VolumeError(f"{path}: its header lacks the mark of a NIfTI file; the file is damaged, get it again")
    _check_fields(path, header)
    try:
        # completes what NIfTI lets writers leave open (a sign for the third axis, the bits of the data type)
        header.check_fix(logger=_SILENT, error_level=40)
        dtype = header.get_data_dtype()
    except HeaderDataError as error:
        raise VolumeError(f"{path}: has a damaged header ({error}); get the file again") from None
    if dtype.kind not in "iuf":
        kind = "complex numbers" if dtype.kind == "c" else "colours"
        raise VolumeError(f"{path}: holds {kind}, not one number per voxel; save its grey values or magnitude instead")
    return header


def _check_fields(path: Path, header: nibabel.Nifti1Header) -> None:
    """Check what nibabel would repair silently or accept: dimensions, scaling, codes, voxel sizes, units, offset."""
    rank = int(header["dim"][0])
    if not 1 <= rank <= 7:
        raise VolumeError(f"{path}: claims {rank} dimensions; the header is damaged, get the file again")
    shape = tuple(int(size) for size in header["dim"][1 : rank + 1])
    if min(shape) < 1:
        raise VolumeError(f"{path}: claims the shape {shape}; every size must be positive, get the file again")
    if rank < 3 or any(size != 1 for size in shape[3:]):
        raise VolumeError(f"{path}: has the shape {shape}; one 3-D volume is needed, split series into volumes first")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or (slope != 0 and not np.isfinite(intercept)):
        raise VolumeError(
            f"{path}: scales its voxels by scl_slope {slope:g} and scl_inter {intercept:g}: unknown values; "
            "set scl_slope to 0 (no scaling) or to the true factor"
        )
    for name in ("qform_code", "sform_code"):
        if int(header[name]) not in _KNOWN_XFORM_CODES:
            raise VolumeError(f"{path}: has {name} {int(header[name])}, unknown to NIfTI; set the right code")
    sizes = header["pixdim"][1:4]
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        text = ", ".join(f"{size:g}" for size in sizes)
        raise VolumeError(f"{path}: has voxel sizes ({text}); they must be positive and finite, correct pixdim")
    unit = int(header["xyzt_units"]) & 7
    if unit not in (0, 2):
        name = _UNIT_NAMES.get(unit, f"unit {unit}")
        raise VolumeError(f"{path}: measures its voxels in {name}; millimetres are needed, rewrite the header")
    offset = float(header["vox_offset"])
    if not (np.isfinite(offset) and offset == int(offset) and offset >= 0):
        raise VolumeError(f"{path}: puts its voxels at byte {offset:g}; the header is damaged, get the file again")


def _shape(header: nibabel.Nifti1Header) -> tuple[int, int, int]:
    return tuple(int(size) for size in header["dim"][1:4])


def _read_voxels(path: Path, stream: BinaryIO, header: nibabel.Nifti1Header) -> np.ndarray:
    """(X, Y, Z) in the stored type; reads to the end of the stream, where gzip compares the checksum."""
    shape, dtype, offset = _shape(header), header.get_data_dtype(), header.get_data_offset()
    count = shape[0] * shape[1] * shape[2]
    total = offset + count * dtype.itemsize
    described = f"{path}: describes {' x '.join(map(str, shape))} voxels of {dtype.name}, {total} bytes in all"
    size = path.stat().st_size
    packed = isinstance(stream, gzip.GzipFile)
    if total > size * (_GZIP_MAX_RATIO if packed else 1):
        raise VolumeError(f"{described}, which {size} bytes on disk cannot hold; the file is damaged, get it again")
    require_memory(count * (dtype.itemsize + 4), str(path), "crop the volume or use a larger machine")
    # header extensions (private notes of other programs) lie between header and voxels
    gap = offset - header.sizeof_hdr
    while gap > 0:
        skipped = len(stream.read(min(gap, _READ_STEP)))
        if not skipped:
            raise VolumeError(f"{described}, but ends before its voxels begin; get the file again")
        gap -= skipped
    raw = np.empty(count * dtype.itemsize, np.uint8)
    filled = 0
    while filled < raw.size:
        step = stream.readinto(memoryview(raw)[filled:])
        if not step:
            raise VolumeError(f"{described}, but ends after {offset + filled}; the file is cut off, get it again")
        filled += step
    if stream.read(1):
        raise VolumeError(
            f"{described}, but more bytes follow; header and voxels do not belong together, get the file again or, "
            "if its header is right, save it anew"
        )
    return raw.view(dtype).reshape(shape, order="F")


def _scale(path: Path, raw: np.ndarray, header: nibabel.Nifti1Header) -> np.ndarray:
    """(X, Y, Z) float32: raw * slope + intercept, computed in float64 one slice at a time."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    voxels = np.empty(raw.shape, np.float32, order="F")
    bad = 0
    for index in range(raw.shape[2]):
        values = raw[:, :, index].astype(np.float64)
        # values beyond float32 become infinite and are counted
        with np.errstate(over="ignore", invalid="ignore"):
            # NIfTI: a slope of 0 means that the voxels are stored as they are
            voxels[:, :, index] = values if slope == 0 else values * slope + intercept
        bad += int(np.count_nonzero(~np.isfinite(voxels[:, :, index])))
    if bad:
        raise VolumeError(
            f"{path}: {bad} of {raw.size} voxels are not finite numbers; set them right, for example with "
            "numpy.nan_to_num, and save the file anew"
        )
    return voxels


def _affine(path: Path, header: nibabel.Nifti1Header) -> np.ndarray:
    try:
        affine = header.get_best_affine().astype(np.float64)
    # a quaternion longer than 1
    except ValueError as error:
        raise VolumeError(f"{path}: has a damaged qform ({error}); set its affine anew") from None
    if not np.isfinite(affine).all():
        raise VolumeError(f"{path}: has an affine with values that are not finite; set its affine anew")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()) or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise VolumeError(f"{path}: has an affine that cannot be inverted; set its affine anew")
    if spacing.min() < _SMALLEST_VOXEL_MM or spacing.max() > _LARGEST_VOXEL_MM:
        text = " x ".join(f"{size:g}" for size in spacing)
        raise VolumeError(f"{path}: has voxels of {text} mm, which no scanner makes; set its affine anew")
    return affine


def _notes(header: nibabel.Nifti1Header, voxels: np.ndarray, affine: np.ndarray) -> tuple[str, ...]:
    notes = []
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        notes.append("the file stores no orientation (sform and qform unset); left and right are a guess")
    if sform and qform:
        corners = np.array(np.meshgrid(*((0, size - 1) for size in voxels.shape))).reshape(3, -1)
        try:
            gap = np.abs((header.get_qform() - affine)[:3] @ np.vstack([corners, np.ones(corners.shape[1])])).max()
        # the qform is not used: its damage matters no more than its disagreement
        except ValueError:
            gap = np.inf
        if not gap <= _XFORM_TOLERANCE_MM:
            notes.append(f"sform and qform differ by up to {gap:.1f} mm; the sform is used")
    if np.ptp(voxels) == 0:
        notes.append(f"every voxel is {voxels.flat[0]:g}; there is nothing to segment")
    return tuple(notes)
