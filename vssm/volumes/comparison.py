"""A picture that sets segmentations of one volume side by side: a row each, the contours on the same three planes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .writing import atomic_file

# (title, axis of RAS that the plane cuts, names at its left and right edge)
_PLANES = (("sagittal", 0, "PA"), ("coronal", 1, "LR"), ("axial", 2, "LR"))
_COLOURS = ("#ffb000", "#35c9ff", "#ff5fa2", "#7ddf64")


def draw_comparison(
    voxels: np.ndarray,
    rows: Mapping[str, np.ndarray],
    names: tuple[str, ...],
    centre: tuple[int, int, int],
    title: str,
    path: Path,
    midline: int | None = None,
) -> None:
    """Write a PNG with one row of sagittal, coronal and axial plane for each segmentation.

    Args:
        voxels: (X, Y, Z) grey values with axes to the right, front and top, of equal spacing.
        rows: name of each row -> (X, Y, Z) integer labels, 0 is background.
        names: name of each label, `names[0]` the background's.
        centre: voxel that the three planes go through.
        title: above the picture.
        path: the picture; it is replaced if it exists.
        midline: index along X at which to draw the border between two sides, or None.

    Raises:
        VolumeError: if the picture cannot be written.
    """
    low, high = np.percentile(voxels, (0.5, 99.8))
    figure = Figure(figsize=(12, 1.0 + 3.9 * len(rows)), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(_PLANES), squeeze=False)
    for (row, labels), line in zip(rows.items(), grid, strict=True):
        for axes, (plane, cut, (left, right)) in zip(line, _PLANES, strict=True):
            grey, outline = (np.take(array, centre[cut], axis=cut).T for array in (voxels, labels))
            axes.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bilinear")
            for label in range(1, len(names)):
                if (outline == label).any():
                    axes.contour(outline == label, levels=[0.5], colors=[_COLOURS[label - 1]], linewidths=1.1)
            if midline is not None and cut != 0:
                axes.axvline(midline, color="white", linewidth=0.8, linestyle=(0, (4, 4)))
            axes.set_title(f"{row}: {plane}", color="white", fontsize=12)
            for position, side in ((0.03, left), (0.97, right)):
                axes.text(position, 0.04, side, color="white", ha="center", fontsize=12, transform=axes.transAxes)
            axes.set_axis_off()
    figure.suptitle(title, color="white", fontsize=14)
    lines = [Line2D([], [], color=colour, label=name) for colour, name in zip(_COLOURS, names[1:], strict=False)]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), labelcolor="white", frameon=False)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=90)
