"""Random changes to patches: nnU-Net's set for grey values, flips alone, and flips with rotations for pictures.

nnU-Net's probabilities and ranges (Isensee et al., Nature Methods 18, 2021, supplementary note 4; its code since v2).
Letters: C is the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import monai.transforms as mt
import numpy as np
import torch
from torch import Tensor

from .planning import Plan

_BOTH = ("image", "labels")
# patches this much longer along one axis than along another are rotated by 15 degrees at most
_ELONGATED = 1.5
# and an axis this much shorter than the others is not rotated into them
_THIN = 3
# nnU-Net multiplies coordinates by 0.7 to 1.4, which zooms by the inverse
_ZOOM = (1 / 1.4, 1 / 0.7)
# what a rotation and a scaling can bring in from outside; nnU-Net reads as much more
_MARGIN = 1.3


class Augmentation:
    """One set of random transforms, the same for the same seed.

    Args:
        kind: "nnunet", "flips" or "pictures".
        plan: sizes.
        mirror_axes: axes along which patches are mirrored, each with probability 1/2.

    Attributes:
        piece_size: voxels that have to be read around a patch.
    """

    def __init__(self, kind: str, plan: Plan, mirror_axes: Sequence[int]) -> None:
        self.size = plan.network_size
        axes = [axis for axis in mirror_axes if axis < plan.spatial_dims]
        self.piece_size = list(plan.patch_size)
        if kind == "pictures":
            if not plan.is_flat:
                raise ValueError(f"augmentation 'pictures' needs 2-D patches, got {plan.patch_size}; use 'nnunet'")
            self.transform = _Pictures(axes)
            return
        steps = []
        if kind == "nnunet":
            spatial, turned = _spatial(plan)
            for axis in turned:
                # an even margin keeps the middle in the middle
                self.piece_size[axis] += 2 * math.ceil((_MARGIN - 1) * plan.patch_size[axis] / 2)
            steps = [*spatial, mt.CenterSpatialCropd(_BOTH, self.size), *_intensities(plan.spatial_dims)]
        steps += [mt.RandFlipd(_BOTH, prob=0.5, spatial_axis=axis) for axis in axes]
        self.transform = mt.Compose(steps)

    def __call__(self, image: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Image (C, *piece) float32 and labels (1, *piece) int64 -> the same of the patch's size."""
        if isinstance(self.transform, _Pictures):
            return self.transform(image, labels, seed)
        self.transform.set_random_state(seed=seed)
        # float32 holds labels exactly, and interpolation needs it
        result = self.transform({"image": image, "labels": labels.float()})
        # MetaTensor or Tensor, whatever the last transform made
        image, labels = (torch.Tensor.as_subclass(result[key], torch.Tensor) for key in _BOTH)
        return image.float().contiguous(), labels.round().long().contiguous()


def _spatial(plan: Plan) -> tuple[list[mt.Transform], list[int]]:
    """Rotation and scaling, and the axes they move voxels along."""
    size, dims = plan.network_size, plan.spatial_dims
    degrees = 30
    # axis -> the plane it is the normal of
    normals = [0, 1, 2]
    if dims == 2:
        degrees = 15 if max(size) > _ELONGATED * min(size) else 180
        normals = []
    elif max(size) > _THIN * min(size):
        # thick slices: turned within their plane only
        degrees, normals = 180, [int(np.argmin(size))]
    angle = math.radians(degrees)
    ranges = (angle,) if dims == 2 else tuple(angle if axis in normals else 0.0 for axis in range(3))
    turned = [axis for axis in range(dims) if dims == 2 or len(normals) == 3 or axis not in normals]
    rotation = mt.RandAffined(_BOTH, prob=0.2, rotate_range=ranges, mode=("bilinear", "nearest"), padding_mode="zeros")
    # one factor for all axes, unless thick slices keep theirs
    low, high = _ZOOM
    if len(turned) < dims:
        low, high = ([limit if axis in turned else 1.0 for axis in range(dims)] for limit in _ZOOM)
    smooth = {2: "bilinear", 3: "trilinear"}[dims]
    zoom = mt.RandZoomd(_BOTH, prob=0.2, min_zoom=low, max_zoom=high, mode=(smooth, "nearest"), padding_mode="constant")
    return [rotation, zoom], turned


def _intensities(dims: int) -> list[mt.Transform]:
    image = "image"
    smooth = {2: "bilinear", 3: "trilinear"}[dims]
    return [
        # the variance is drawn up to 0.1
        mt.RandGaussianNoised(image, prob=0.1, mean=0.0, std=math.sqrt(0.1)),
        mt.RandGaussianSmoothd(image, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
        mt.RandScaleIntensityd(image, prob=0.15, factors=(-0.25, 0.25)),
        mt.RandScaleIntensityFixedMeand(image, prob=0.15, factors=(-0.25, 0.25), fixed_mean=True, preserve_range=True),
        mt.RandSimulateLowResolutiond(image, prob=0.25, zoom_range=(0.5, 1.0), upsample_mode=smooth),
        mt.RandAdjustContrastd(image, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        mt.RandAdjustContrastd(image, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]


class _Pictures:
    """Flips and rotations by any angle of a picture together with its mask, by albumentations."""

    def __init__(self, mirror_axes: Sequence[int]) -> None:
        try:
            import albumentations
        except ModuleNotFoundError:
            raise ValueError(
                'albumentations is not installed; run pip install "vssm[pictures]" or use augmentation flips'
            ) from None
        flips = {0: albumentations.VerticalFlip, 1: albumentations.HorizontalFlip}
        steps = [flips[axis](p=0.5) for axis in mirror_axes]
        self.compose = albumentations.Compose([*steps, albumentations.Rotate(limit=180, p=0.5)])

    def __call__(self, image: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        self.compose.set_random_seed(seed)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        result = self.compose(image=pixels, mask=labels[0].numpy().astype(np.uint8))
        changed = result["image"].reshape(*result["image"].shape[:2], -1)
        turned = torch.from_numpy(np.ascontiguousarray(np.moveaxis(changed, -1, 0)))
        return turned, torch.from_numpy(result["mask"].astype(np.int64))[None]
