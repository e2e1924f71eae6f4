"""Applying a network to a volume: onto the network's grid, window by window, and back onto the volume's own grid.

Letters: X, Y, Z are the voxels of the volume as stored, x, y, z those of the network's grid, K the labels.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LazyTransform, SpatialResample

from .bundle import Bundle
from .errors import VolumeError
from .evaluation import check_same_grid
from .memory import fits_memory, is_out_of_memory, require_memory
from .reading import Volume
from .scratch import new_array
from .windows import AXES, blend_windows

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
    volume: Volume | Sequence[Volume],
    bundle: Bundle | Sequence[Bundle],
    *,
    device: str = "auto",
    overlap: float | None = None,
    mirror: Sequence[str] = (),
    patch_size: Sequence[int] | None = None,
    scratch: Path | None = None,
    probabilities: np.ndarray | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Segment a volume.

    The bundle's transforms bring the volume to the network's orientation, spacing and intensities. The network runs on
    overlapping windows that are blended on the CPU, so that the device holds one batch of windows at a time. The
    blended logits, not labels, are interpolated linearly onto the volume's own voxels, slab by slab. Of several
    bundles the softmax probabilities at each voxel are averaged. The same input gives the same output.

    Args:
        volume: from `read_volume`; for a network of several input channels one volume each, all on one grid.
        bundle: from `load_bundle`, or several with the same labels (the folds of a cross-validation).
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        overlap: share of a window that its neighbour covers, 0 <= overlap < 1; the bundle's if None.
        mirror: of "x", "y", "z", the axes of the network's grid along which windows are also seen mirrored; the logits
            of all 2 ** len(mirror) passes are averaged.
        patch_size: three sides of a window in voxels; the bundle's if None.
        scratch: folder for a temporary file that takes the logits if they do not fit into memory; None refuses then.
        probabilities: (labels, X, Y, Z) array of any float type that the mean probabilities are written to, or None.
        progress: show a progress bar on standard error.

    Returns:
        (X, Y, Z) uint8, the label of each voxel of `volume`.

    Raises:
        VolumeError: unknown device, an option out of range, a wrong number of channels, different grids or labels, not
            enough memory, or a network that does not fit.
    """
    volumes = (volume,) if isinstance(volume, Volume) else tuple(volume)
    folds = (bundle,) if isinstance(bundle, Bundle) else tuple(bundle)
    target = select_device(device)
    options = _window_options(overlap, mirror, patch_size)
    _check_agreement(volumes, folds)
    image = _as_meta_tensor(volumes)
    shape = volumes[0].voxels.shape
    predicted = [_predicted_voxels(image, fold, patch_size) for fold in folds]
    on_disk = _plan_memory(volumes, folds, predicted, scratch, probabilities)
    logits = [_logits(image, fold, options, target, mirror, scratch if on_disk else None, progress) for fold in folds]
    labels = np.empty(shape, np.uint8)
    share = _SLAB_VALUES // len(folds)
    for slabs in zip(*(_slabs(values, shape, _centred(volumes[0]), share) for values in logits), strict=True):
        start, scores = slabs[0]
        for fold, (_, slab) in zip(folds, slabs, strict=True):
            if not torch.isfinite(slab).all():
                raise VolumeError(
                    f"{volumes[0].path}: the network of bundle {fold.name} returned values that are not finite; check "
                    "its weights and the volume's grey values"
                )
        here = slice(start, start + scores.shape[1])
        if len(folds) > 1 or probabilities is not None:
            likely = sum(slab.softmax(dim=0) for _, slab in slabs) / len(folds)
            scores = likely if len(folds) > 1 else scores
            if probabilities is not None:
                probabilities[:, here] = likely.numpy()
        labels[here] = scores.argmax(dim=0).to(torch.uint8).numpy()
    return labels


def _window_options(overlap: float | None, mirror: Sequence[str], patch_size: Sequence[int] | None) -> dict[str, Any]:
    """What replaces the bundle's own arguments of the sliding window, checked."""
    if overlap is not None and not 0 <= overlap < 1:
        raise VolumeError(f"overlap must be at least 0 and less than 1, got {overlap}; 0.5 is usual")
    if not set(mirror) <= set(AXES) or len(set(mirror)) < len(mirror):
        raise VolumeError(f"mirror takes each of x, y and z at most once, got {' '.join(mirror)}; correct it")
    if patch_size is not None and not (len(patch_size) == 3 and min(patch_size) > 0):
        raise VolumeError(f"the patch size must be three positive numbers of voxels, got {tuple(patch_size)}")
    options = {"overlap": overlap, "roi_size": patch_size}
    return {name: value for name, value in options.items() if value is not None}


def _check_agreement(volumes: tuple[Volume, ...], folds: tuple[Bundle, ...]) -> None:
    first = folds[0]
    for fold in folds[1:]:
        if fold.labels != first.labels:
            raise VolumeError(
                f"bundles {first.name} and {fold.name} have different labels ({', '.join(first.labels)}; "
                f"{', '.join(fold.labels)}); an ensemble needs the same"
            )
    for fold in folds:
        if fold.in_channels != len(volumes):
            raise VolumeError(
                f"{volumes[0].path}: bundle {fold.name} takes {fold.in_channels} image(s) of a subject, got "
                f"{len(volumes)}; give exactly {fold.in_channels}, in the order of its card"
            )
    for other in volumes[1:]:
        check_same_grid(other, volumes[0], "resample the images of a subject to one grid")


def _logits(
    image: MetaTensor,
    bundle: Bundle,
    options: dict[str, Any],
    device: torch.device,
    mirror: Sequence[str],
    scratch: Path | None,
    progress: bool,
) -> MetaTensor:
    """(K, x, y, z) float32: blended logits on the network's grid, in memory or, with `scratch`, in a file there."""
    data = {"image": image}
    path = image.meta["filename_or_obj"]
    try:
        for step in bundle.preprocessing:
            data = step(data)
    # what MONAI raises for voxels that a transform cannot take
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise VolumeError(f"{path}: cannot be prepared for bundle {bundle.name} ({error}); check both") from error
    prepared = data["image"]
    if not torch.isfinite(prepared.as_tensor()).all():
        raise VolumeError(
            f"{path}: its grey values, up to {image.as_tensor().abs().max():g}, are too large "
            f"to be prepared for bundle {bundle.name}; check scl_slope and scl_inter"
        )
    window = bundle.window | options
    total = new_array((len(bundle.labels), *prepared.shape[1:]), np.float32, scratch)
    network = bundle.network.to(device)
    try:
        blend_windows(prepared.as_tensor(), network, window, total, device=device, mirror=mirror, progress=progress)
    except VolumeError as error:
        raise VolumeError(f"bundle {bundle.name}: {error}") from None
    # what networks raise for windows of a size they cannot take
    except (ValueError, RuntimeError) as error:
        size = list(window["roi_size"])
        raise VolumeError(f"bundle {bundle.name}: its network failed on a window of {size} ({error})") from error
    finally:
        network.to("cpu")
    return MetaTensor(torch.from_numpy(total), affine=prepared.affine)


def mismatches(volume: Volume, bundle: Bundle) -> list[str]:
    """One sentence for each way in which the volume does not look like what the bundle's network learned from."""
    notes = []
    grid = _network_grid(_as_meta_tensor([volume]), bundle)
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


def _as_meta_tensor(volumes: Sequence[Volume]) -> MetaTensor:
    """(C, X, Y, Z); one volume shares its voxels, several are copied."""
    channels = [torch.from_numpy(volume.voxels) for volume in volumes]
    stacked = channels[0][None] if len(channels) == 1 else torch.stack(channels)
    # MONAI's names
    meta = {"space": "RAS", "filename_or_obj": str(volumes[0].path)}
    return MetaTensor(stacked, affine=_centred(volumes[0]), meta=meta)


def _network_grid(image: MetaTensor, bundle: Bundle) -> MetaTensor:
    """`image` with its shape and affine on the network's grid pending, nothing computed yet."""
    data = {"image": image}
    for step in bundle.preprocessing:
        if isinstance(step, LazyTransform):
            data = step(data, lazy=True)
    return data["image"]


def _predicted_voxels(image: MetaTensor, bundle: Bundle, patch_size: Sequence[int] | None) -> int:
    """How many voxels the network's grid has, a window at least."""
    sides = zip(_network_grid(image, bundle).peek_pending_shape(), patch_size or bundle.window["roi_size"], strict=True)
    return math.prod(max(int(side), window) for side, window in sides)


def _plan_memory(
    volumes: tuple[Volume, ...],
    folds: tuple[Bundle, ...],
    predicted: list[int],
    scratch: Path | None,
    probabilities: np.ndarray | None,
) -> bool:
    """Whether the logits must go to `scratch`; a volume that does not fit even so is refused.

    Counts the arrays that live at the same time, in bytes.
    """
    channels, stored, largest = len(volumes), volumes[0].voxels.size, max(predicted)
    # float32 in the network's orientation, float64 for the interpolation, twice; coordinates and results in float64,
    # results in float32, what normalisation needs
    preparing = channels * (22 * stored + 60 * largest)
    # prepared voxels, weights; labels and the slab on the way back
    labelling = (4 * channels + 8) * largest + stored + 8 * _SLAB_VALUES
    filled = 0 if probabilities is None or isinstance(probabilities, np.memmap) else probabilities.nbytes
    logits = [4 * len(fold.labels) * count for fold, count in zip(folds, predicted, strict=True)]
    in_memory = max(preparing + sum(logits[:-1]), labelling + sum(logits)) + filled
    on_disk = scratch is not None and not fits_memory(in_memory)
    require_memory(
        max(preparing, labelling) + filled if on_disk else in_memory,
        f"{volumes[0].path}: prediction on {largest / 1e6:.1f} million voxels",
        "crop the volume or use a larger machine",
    )
    return on_disk


def _slabs(
    logits: MetaTensor, shape: tuple[int, int, int], affine: torch.Tensor, values: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Interpolate logits (K, x, y, z) onto the grid of `shape` and `affine`, about `values` values at a time.

    Yields:
        (start, (K, n, Y, Z) float32): the values for the n planes that begin at index `start` of the first axis.
    """
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float32)
    # per voxel K logits, their copy on the way out and three coordinates
    planes = max(1, values // ((2 * logits.shape[0] + 3) * shape[1] * shape[2]))
    for start in range(0, shape[0], planes):
        corner = affine.clone()
        corner[:3, 3] += start * affine[:3, 0]
        size = (min(planes, shape[0] - start), *shape[1:])
        yield start, resample(logits, dst_affine=corner, spatial_size=size).as_tensor()
