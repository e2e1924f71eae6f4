"""Pictures of the worst cases: truth and prediction side by side on the slice with most wrong voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..volumes.writing import atomic_file

_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class DrawnCase:
    """What is drawn of a case: image (C, X, Y, Z), labels (X, Y, Z) twice, spacing in mm, and its mean Dice."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    spacing: Sequence[float]
    dice: float


def draw_worst_cases(cases: Sequence[DrawnCase], names: Sequence[str], path: Path, pictures: bool = False) -> None:
    """Write a PNG with a row for each case: contours of truth and of prediction.

    Args:
        names: of the labels, `names[0]` the background's.
        pictures: rows and columns of the arrays are those of the picture; volumes have the axes right, front, top.

    Raises:
        VolumeError: the picture cannot be written.
    """
    colours = matplotlib.colormaps["Set1"].colors
    figure = Figure(figsize=(9, 4.6 * len(cases)), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        index = int((case.truth != case.predicted).sum(axis=(0, 1)).argmax())
        low, high = np.percentile(case.image[:, :, :, index], _PERCENTILES)
        plane = np.clip((case.image[:, :, :, index] - low) / max(high - low, 1e-6), 0, 1)
        plane = np.moveaxis(plane, 0, -1) if pictures and len(plane) == 3 else plane[0]
        for axes, title, labels in zip(row, ("truth", "predicted"), (case.truth, case.predicted), strict=True):
            outline = labels[:, :, index]
            if pictures:
                axes.imshow(plane, cmap="gray")
            else:
                aspect = case.spacing[1] / case.spacing[0]
                axes.imshow(plane.T, cmap="gray", origin="lower", aspect=aspect)
                outline = outline.T
            for label in np.unique(outline[outline > 0]):
                colour = colours[(label - 1) % len(colours)]
                axes.contour(outline == label, levels=[0.5], colors=[colour], linewidths=1.5)
            axes.set_title(f"{case.name}, {title}, Dice {case.dice:.3f}, slice {index}", color="white", fontsize=9)
            axes.set_axis_off()
    lines = [Line2D([], [], color=colours[index % len(colours)], label=name) for index, name in enumerate(names[1:])]
    figure.legend(
        handles=lines, loc="outside lower center", ncols=min(6, len(lines)), labelcolor="white", frameon=False
    )
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=80)
