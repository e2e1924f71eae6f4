"""A picture of a segmentation: contours of the labels on three planes through the segmented region."""

from pathlib import Path

import matplotlib
import nibabel
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .writing import atomic_file

# (title, axis of RAS that the plane cuts, names at its left and right edge)
_PLANES = (("sagittal", 0, "PA"), ("coronal", 1, "LR"), ("axial", 2, "LR"))
_GREY_PERCENTILES = (0.5, 99.5)


def draw_overlay(
    voxels: np.ndarray, labels: np.ndarray, affine: np.ndarray, names: tuple[str, ...], path: Path
) -> None:
    """Write a PNG with the sagittal, coronal and axial plane through the middle of the labelled voxels.

    Args:
        voxels: (X, Y, Z) grey values.
        labels: (X, Y, Z) integers, 0 is background.
        affine: (4, 4) voxel index to mm in RAS+.
        names: name of each label, `names[0]` the background's.
        path: the picture; it is replaced if it exists.

    Raises:
        VolumeError: if the picture cannot be written.
    """
    orientation = nibabel.io_orientation(affine)
    grey, regions = (nibabel.apply_orientation(array, orientation) for array in (voxels, labels))
    # spacing in the order of the RAS axes
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(orientation[:, 0])]
    marked = np.argwhere(regions > 0)
    centre = np.median(marked, axis=0).astype(int) if len(marked) else np.array(regions.shape) // 2
    low, high = np.percentile(grey, _GREY_PERCENTILES)
    colours = matplotlib.colormaps["tab10"].colors
    figure = Figure(figsize=(12, 4.6), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, cut, (left, right)) in zip(figure.subplots(1, 3), _PLANES, strict=True):
        rows, columns = (axis for axis in (2, 1, 0) if axis != cut)
        plane, outline = (np.take(array, centre[cut], axis=cut).T for array in (grey, regions))
        aspect = spacing[rows] / spacing[columns]
        axes.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
        # contours need two points along each side
        if min(outline.shape) > 1:
            for label in np.unique(outline[outline > 0]):
                colour = colours[(label - 1) % len(colours)]
                axes.contour(outline == label, levels=[0.5], colors=[colour], linewidths=0.9)
        axes.set_title(f"{title}   {left} - {right}", color="white")
        axes.axis("off")
    shown = [label for label in range(1, len(names)) if (regions == label).any()]
    lines = [Line2D([], [], color=colours[(label - 1) % len(colours)], label=names[label]) for label in shown]
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), labelcolor="white", frameon=False)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=100)
