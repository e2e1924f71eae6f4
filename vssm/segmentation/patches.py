"""Patches to train on: everything about patch i follows from the seed and i, so that resuming needs no state.

Letters: C is the channels; x, y, z the voxels of a patch, of which the network does not see z where the plan is flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation
from .planning import Plan
from .preparing import PreparedCase


class PatchDataset(Dataset):
    """Patch i of a run, for any whole number i.

    Args:
        cases: to draw from, all equally often.
        plan: sizes.
        seed: of everything random.
        foreground_share: of the patches, centred on a voxel with a label that is drawn from those of the case: patches
            i with floor((i + 1) share) > floor(i share), so that any run of patches has its part.
        augmentation: applied to larger pieces, which it cuts to patches; None: none.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        plan: Plan,
        seed: int,
        foreground_share: float,
        augmentation: Augmentation | None,
    ) -> None:
        self.cases = list(cases)
        self.plan = plan
        self.seed = seed
        self.foreground_share = foreground_share
        self.augmentation = augmentation

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Image (C, *network size) float32, labels (1, *network size) int64, and the name of the case."""
        rng = np.random.default_rng([self.seed, index])
        case = self.cases[rng.integers(len(self.cases))]
        share = self.foreground_share
        forced = math.floor((index + 1) * share) > math.floor(index * share)
        size = self.plan.patch_size
        piece = size if self.augmentation is None else self.augmentation.piece_size
        corner = _corner(case, size, forced, rng)
        # the larger piece has the patch in its middle
        corner = [start - (larger - side) // 2 for start, larger, side in zip(corner, piece, size, strict=True)]
        image = torch.from_numpy(_cut(case.image, corner, piece))
        labels = torch.from_numpy(_cut(case.labels[None], corner, piece).astype(np.int64))
        if self.plan.is_flat:
            image, labels = image[..., 0], labels[..., 0]
        if self.augmentation is not None:
            image, labels = self.augmentation(image, labels, int(rng.integers(2**31)))
        return image, labels, case.name


def _corner(case: PreparedCase, size: Sequence[int], forced: bool, rng: np.random.Generator) -> list[int]:
    """First voxel of a patch: inside the case where that is larger, around it where the patch is."""
    shape = case.labels.shape
    low = [min(0, whole - side) // 2 for whole, side in zip(shape, size, strict=True)]
    high = [start + max(0, whole - side) for start, whole, side in zip(low, shape, size, strict=True)]
    if forced and case.centres:
        label = sorted(case.centres)[rng.integers(len(case.centres))]
        voxels = case.centres[label]
        centre = voxels[rng.integers(len(voxels))]
        wanted = [int(middle) - side // 2 for middle, side in zip(centre, size, strict=True)]
        return [min(max(start, least), most) for start, least, most in zip(wanted, low, high, strict=True)]
    return [int(rng.integers(least, most + 1)) for least, most in zip(low, high, strict=True)]


def _cut(array: np.ndarray, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """(C, *size) of (C, X, Y, Z), zero outside."""
    piece = np.zeros((len(array), *size), array.dtype)
    source, target = [slice(None)], [slice(None)]
    for start, side, whole in zip(corner, size, array.shape[1:], strict=True):
        first, last = max(start, 0), max(min(start + side, whole), 0)
        source.append(slice(first, max(first, last)))
        target.append(slice(first - start, first - start + max(0, last - first)))
    piece[tuple(target)] = array[tuple(source)]
    return piece
