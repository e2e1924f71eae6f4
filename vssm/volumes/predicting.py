"""Applying a network to a volume: onto the network's grid, window by window, and back onto the volume's own grid.

Letters: X, Y, Z are the voxels of the volume as stored, x, y, z those of the network's grid, K the labels.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import LazyTransform, SpatialResample

from .bundle import Bundle
from .errors import VolumeError
from .memory import require_memory
from .reading import Volume

# values of logits and coordinates held at once while the result is brought back to the volume's grid
_SLAB_VALUES = 1 << 25
# a field of view this many times larger or smaller than the one learned from is worth a warning
_FIELD_OF_VIEW_RATIO = 1.5
# what is brighter than this part of the 99th percentile counts as foreground
_FOREGROUND, _PERCENTILE = 0.3, 99
# a foreground this many times larger, or smaller, than the one learned from is worth a warning
_FOREGROUND_MORE, _FOREGROUND_LESS = 1.5, 2.0
# voxels this many times longer than the network's show too little for it
_SPACING_RATIO = 2.0


def select_device(name: str) -> torch.device:
    """Device for "auto" (cuda if there is one, else cpu), "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        VolumeError: if the name is not a device or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise VolumeError(f"device {name!r} is not known; use auto, cpu, cuda or mps") from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in counts:
        raise VolumeError(f"device {name!r} is not supported; use auto, cpu, cuda or mps")
    if (device.index or 0) >= counts[device.type]:
        raise VolumeError(f"device {name!r} is not available here; use --device cpu")
    return device


def predict_volume(
    volume: Volume, bundle: Bundle, *, device: str = "auto", overlap: float | None = None, progress: bool = False
) -> np.ndarray:
    """Segment a volume.

    The bundle's transforms bring the volume to the network's orientation, spacing and intensities. The network runs on
    overlapping windows that are blended on the CPU, so that the device holds one batch of windows at a time. The
    blended logits, not labels, are interpolated linearly onto the volume's own voxels, slab by slab. The same input
    gives the same output.

    Args:
        volume: from `read_volume`.
        bundle: from `load_bundle`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        overlap: share of a window that its neighbour covers, 0 <= overlap < 1; the bundle's if None.
        progress: show a progress bar on standard error.

    Returns:
        (X, Y, Z) uint8, the label of each voxel of `volume`.

    Raises:
        VolumeError: unknown device, overlap out of range, not enough memory, or a network that does not fit.
    """
    target = select_device(device)
    if overlap is not None and not 0 <= overlap < 1:
        raise VolumeError(f"overlap must be at least 0 and less than 1, got {overlap}; 0.5 is usual")
    image = _as_meta_tensor(volume)
    grid = _network_grid(image, bundle)
    _require_memory(volume, grid, bundle)
    data = {"image": image}
    for step in bundle.preprocessing:
        data = step(data)
    image = data["image"]
    options = bundle.window | ({} if overlap is None else {"overlap": overlap})
    inferer = SlidingWindowInferer(**options, sw_device=target, device=torch.device("cpu"), progress=progress)
    network = bundle.network.to(target)
    try:
        with torch.inference_mode():
            logits = inferer(image.as_tensor()[None], network)
    except torch.OutOfMemoryError:
        raise VolumeError(f"{target} has too little memory for windows of this bundle; use --device cpu") from None
    # what networks raise for windows of a size they cannot take
    except (ValueError, RuntimeError) as error:
        size = bundle.window["roi_size"]
        raise VolumeError(f"bundle {bundle.name}: its network failed on a window of {size} ({error})") from error
    finally:
        network.to("cpu")
    expected = (1, len(bundle.labels), *image.shape[1:])
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != expected:
        raise VolumeError(
            f"bundle {bundle.name}: its network must return one tensor of a channel per label and the windows' size, "
            f"{expected} in all, got {found}; correct the bundle"
        )
    labels = np.empty(volume.voxels.shape, np.uint8)
    logits = MetaTensor(logits[0].contiguous(), affine=image.affine)
    for start, slab in _slabs(logits, volume.voxels.shape, _centred(volume)):
        if not torch.isfinite(slab).all():
            raise VolumeError(
                f"bundle {bundle.name}: its network returned values that are not finite; check its weights"
            )
        labels[start : start + slab.shape[1]] = slab.argmax(dim=0).to(torch.uint8).numpy()
    return labels


def mismatches(volume: Volume, bundle: Bundle) -> list[str]:
    """One sentence for each way in which the volume does not look like what the bundle's network learned from."""
    notes = []
    grid = _network_grid(_as_meta_tensor(volume), bundle)
    spacing = np.linalg.norm(grid.peek_pending_affine()[:3, :3].numpy(), axis=0)
    extent = spacing * grid.peek_pending_shape()
    learned = bundle.field_of_view_mm
    if learned is not None and np.abs(np.log(extent / learned)).max() > math.log(_FIELD_OF_VIEW_RATIO):
        notes.append(
            f"the volume covers {_millimetres(extent)}, {bundle.name} learned from {_millimetres(learned)}; "
            "the result may be meaningless"
        )
    if bundle.foreground_ml is not None:
        bright = foreground_ml(volume.voxels, volume.affine)
        if not bundle.foreground_ml / _FOREGROUND_LESS < bright < bundle.foreground_ml * _FOREGROUND_MORE:
            notes.append(
                f"{bright:.0f} ml of the volume are bright, {bundle.name} learned from {bundle.foreground_ml:.0f} ml; "
                "is it cropped, is it prepared as the bundle's card says, the skull removed for example?"
            )
    coarsest = volume.spacing.max()
    if coarsest > _SPACING_RATIO * spacing.max():
        notes.append(f"voxels are up to {coarsest:.1f} mm long, {bundle.name} works at {spacing.max():.1f} mm")
    return notes


def foreground_ml(voxels: np.ndarray, affine: np.ndarray) -> float:
    """Volume in ml of the voxels brighter than 0.3 of the 99th percentile: for a head, all of it but air and bone.

    Args:
        voxels: (X, Y, Z) grey values.
        affine: (4, 4) voxel index to mm.
    """
    bright = np.count_nonzero(voxels > _FOREGROUND * np.percentile(voxels, _PERCENTILE))
    return bright * abs(np.linalg.det(affine[:3, :3])) / 1000


def _millimetres(sizes: np.ndarray | tuple[float, ...]) -> str:
    return " x ".join(f"{size:.0f}" for size in sizes) + " mm"


def _centred(volume: Volume) -> torch.Tensor:
    """(4, 4) affine without its origin: prediction depends on directions only, and a far origin would cost digits."""
    affine = torch.from_numpy(volume.affine.copy())
    affine[:3, 3] = 0
    return affine


def _as_meta_tensor(volume: Volume) -> MetaTensor:
    """(1, X, Y, Z), sharing the voxels."""
    return MetaTensor(torch.from_numpy(volume.voxels)[None], affine=_centred(volume), meta={"space": "RAS"})


def _network_grid(image: MetaTensor, bundle: Bundle) -> MetaTensor:
    """`image` with its shape and affine on the network's grid pending, nothing computed yet."""
    data = {"image": image}
    for step in bundle.preprocessing:
        if isinstance(step, LazyTransform):
            data = step(data, lazy=True)
    return data["image"]


def _require_memory(volume: Volume, grid: MetaTensor, bundle: Bundle) -> None:
    """Refuse a volume whose prediction would not fit: counts of the arrays that live at the same time, in bytes."""
    stored = volume.voxels.size
    sides = zip(grid.peek_pending_shape(), bundle.window["roi_size"], strict=True)
    predicted = math.prod(max(int(side), window) for side, window in sides)
    # float32 in the network's orientation, float64 for the interpolation, twice; coordinates and results in float64,
    # results in float32, what normalisation needs
    preparing = 22 * stored + 60 * predicted
    # logits, once more without the padding of a small volume, voxels, weights; labels and the slab on the way back
    labelling = (8 * len(bundle.labels) + 12) * predicted + stored + 8 * _SLAB_VALUES
    remedy = "crop the volume or use a larger machine"
    require_memory(
        max(preparing, labelling), f"{volume.path}: prediction on {predicted / 1e6:.1f} million voxels", remedy
    )


def _slabs(logits: MetaTensor, shape: tuple[int, int, int], affine: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Interpolate logits (K, x, y, z) onto the grid of `shape` and `affine`.

    Yields:
        (start, (K, n, Y, Z) float32): the values for the n planes that begin at index `start` of the first axis.
    """
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float32)
    # per voxel K logits, their copy on the way out and three coordinates
    planes = max(1, _SLAB_VALUES // ((2 * logits.shape[0] + 3) * shape[1] * shape[2]))
    for start in range(0, shape[0], planes):
        corner = affine.clone()
        corner[:3, 3] += start * affine[:3, 0]
        size = (min(planes, shape[0] - start), *shape[1:])
        yield start, resample(logits, dst_affine=corner, spatial_size=size).as_tensor()
