"""Running a network on overlapping windows and blending its logits into an array of the caller's.

MONAI's `sliding_window_inference` gives the same values, but allocates the blended array itself, in memory only.

Letters: B windows per batch, C input channels, K labels, x, y, z the voxels of the network's grid.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.utils import ensure_tuple_rep
from torch import nn
from tqdm import tqdm

from .errors import VolumeError
from .memory import is_out_of_memory

AXES = ("x", "y", "z")
# MONAI's defaults, but for the mode
_DEFAULTS = {
    "sw_batch_size": 1, "overlap": 0.25, "mode": "gaussian", "sigma_scale": 0.125, "padding_mode": "constant",
    "cval": 0.0,
}  # fmt: skip
# no network takes windows of fewer voxels along each side
_SMALLEST_SIDE = 8


def blend_windows(
    image: torch.Tensor,
    network: nn.Module,
    window: dict[str, Any],
    total: np.ndarray,
    *,
    device: torch.device,
    mirror: Sequence[str] = (),
    progress: bool = False,
) -> None:
    """Fill `total` with the network's logits: weighted means over all windows that see a voxel.

    With `mirror`, every window is also seen mirrored along each combination of these axes, and the logits of all
    2 ** len(mirror) passes are averaged. Needs memory for one weight per voxel, and for one batch on the device.

    Args:
        image: (C, x, y, z) float32 on the CPU.
        network: on `device`; (B, C, *roi_size) to (B, K, *roi_size).
        window: arguments of `monai.inferers.SlidingWindowInferer`, `roi_size` among them; the mode is "gaussian" if
            not set.
        total: (K, x, y, z) float32 zeros, in memory or mapped.
        mirror: of "x", "y", "z", the axes of the network's grid.
        progress: show a progress bar on standard error.

    Raises:
        VolumeError: the device's memory is too small, with the window that would fit, or the network returns
            something else than logits of that shape.
        ValueError, RuntimeError: from a network that cannot take such windows.
    """
    options = _DEFAULTS | window
    exhausted = False
    try:
        with torch.inference_mode():
            _blend(image, network, options, torch.from_numpy(total), device, mirror, progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        exhausted = True
    # the failed pass's tensors are free only after its exception is gone
    if exhausted:
        size = tuple(options["roi_size"])
        fitting = _fitting_size(network, len(image), size, device)
        remedy = (
            f"windows of {_times(fitting)} fit, use --patch-size {' '.join(map(str, fitting))} or a larger machine"
            if fitting
            else "no smaller window fits either, use a larger machine"
        )
        if device.type != "cpu":
            remedy += " or --device cpu"
        raise VolumeError(f"{device} has too little memory for windows of {_times(size)} voxels; {remedy}")


def _blend(
    image: torch.Tensor,
    network: nn.Module,
    options: dict[str, Any],
    total: torch.Tensor,
    device: torch.device,
    mirror: Sequence[str],
    progress: bool,
) -> None:
    size, shape = tuple(options["roi_size"]), image.shape[1:]
    missing = [max(side - voxels, 0) for side, voxels in zip(size, shape, strict=True)]
    before = [lack // 2 for lack in missing]
    if any(missing):
        ends = [end for lack, start in zip(missing, before, strict=True) for end in (lack - start, start)]
        image = nn.functional.pad(image[None], ends[::-1], mode=options["padding_mode"], value=options["cval"])[0]
    overlaps = ensure_tuple_rep(options["overlap"], 3)
    steps = [max(1, int(side * (1 - overlap))) for side, overlap in zip(size, overlaps, strict=True)]
    weight = compute_importance_map(size, options["mode"], options["sigma_scale"], device, torch.float32)
    kept_weight = weight.cpu()
    count = torch.zeros(shape)
    places = dense_patch_slices(image.shape[1:], size, steps)
    batch = options["sw_batch_size"]
    for first in tqdm(range(0, len(places), batch), unit="window", leave=False, disable=not progress):
        group = places[first : first + batch]
        windows = torch.stack([image[(slice(None), *place)] for place in group]).to(device)
        logits = _mirrored(network, windows, mirror)
        expected = (len(group), len(total), *size)
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if found != expected:
            raise VolumeError(
                f"the network must return one tensor of a channel per label and the windows' size, {expected}, got "
                f"{found}; correct the bundle"
            )
        for values, place in zip((logits * weight).cpu(), group, strict=True):
            inside, part = _unpadded(place, before, shape)
            total[(slice(None), *inside)] += values[(slice(None), *part)]
            count[inside] += kept_weight[part]
    total /= count


def _mirrored(network: nn.Module, windows: torch.Tensor, mirror: Sequence[str]) -> Any:
    """Mean of the logits over all mirrored passes; without mirroring what the network returns."""
    if not mirror:
        return network(windows)
    axes = [AXES.index(axis) + 2 for axis in mirror]
    passes = [flips for count in range(len(axes) + 1) for flips in itertools.combinations(axes, count)]
    return sum(network(windows.flip(flips)).flip(flips) for flips in passes) / len(passes)


def _unpadded(
    place: tuple[slice, ...], before: list[int], shape: torch.Size
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of the volume that a window of the padded volume covers, and the part of the window that covers it."""
    inside, part = [], []
    for side, start, voxels in zip(place, before, shape, strict=True):
        low, high = max(side.start - start, 0), min(side.stop - start, voxels)
        inside.append(slice(low, high))
        part.append(slice(low + start - side.start, high + start - side.start))
    return tuple(inside), tuple(part)


def _fitting_size(
    network: nn.Module, channels: int, size: tuple[int, ...], device: torch.device
) -> tuple[int, ...] | None:
    """The first window that fits, found by trying: the longest side is halved until one pass works."""
    sides = list(size)
    while max(sides) >= 2 * _SMALLEST_SIDE:
        sides[sides.index(max(sides))] //= 2
        try:
            with torch.inference_mode():
                network(torch.zeros(1, channels, *sides, device=device))
            return tuple(sides)
        # too large still, or of a size that the network cannot take
        except (RuntimeError, ValueError, MemoryError):
            continue
    return None


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
