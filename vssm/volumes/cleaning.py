"""Removing parts of a label map that are no structure: all but the largest component, or components too small.

scipy finds the components: MONAI's transforms for this need scikit-image, which nothing else here does.
"""

import numpy as np
from scipy import ndimage

# voxels that touch at a face, an edge or a corner belong together
_TOUCHING = np.ones((3, 3, 3))


def clean_labels(labels: np.ndarray, voxel_ml: float, *, keep_largest: bool = False, min_size_ml: float = 0.0) -> int:
    """Set components of a label map to background, in place.

    Each label is looked at alone; voxels that touch at a face, an edge or a corner are one component.

    Args:
        labels: (X, Y, Z) integers, 0 is background.
        voxel_ml: volume of a voxel in ml.
        keep_largest: keep only the largest component of each label; of equal ones the first in the array's order.
        min_size_ml: remove components of less than this volume in ml.

    Returns:
        how many voxels were set to background.
    """
    removed = 0
    # each label within its bounding box only
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        components, count = ndimage.label(labels[box] == label, _TOUCHING)
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        keep = sizes * voxel_ml >= min_size_ml
        if keep_largest:
            keep &= np.arange(count) == sizes.argmax()
        gone = np.concatenate([[False], ~keep])[components]
        labels[box][gone] = 0
        removed += int(np.count_nonzero(gone))
    return removed
