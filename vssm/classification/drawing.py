"""What a classifier takes for what, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..atomic import replaced_file

# more classes than this make no readable matrix: the worst of them are drawn
_READABLE = 40


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Write a PNG: the matrix of up to 40 classes, of more the 40 that are found least often.

    Args:
        confusion: (K, K), pictures of each class (rows) that were taken for each class (columns).
        classes: names, or none: their numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = confusion.numpy()
    names = list(classes) or [str(index) for index in range(len(counts))]
    total = counts.sum(axis=1)
    found = np.diagonal(counts) / np.maximum(total, 1)
    figure = Figure(figsize=(6, 6) if len(counts) <= _READABLE else (7, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    title = f"top-1 {100 * np.trace(counts) / max(counts.sum(), 1):.2f} % of {counts.sum()} pictures"
    if len(counts) <= _READABLE:
        axes.imshow(counts / np.maximum(total, 1)[:, None], cmap="Blues", vmin=0, vmax=1)
        size = 9 if len(counts) <= 20 else 5
        for row, column in np.argwhere(counts):
            colour = "white" if counts[row, column] > total[row] / 2 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=size)
        axes.set_xticks(range(len(names)), names, fontsize=size, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.set_xlabel("taken for")
        axes.set_ylabel("is")
    else:
        worst = [index for index in np.argsort(found, kind="stable") if total[index]][:_READABLE][::-1]
        axes.barh(range(len(worst)), 100 * found[worst])
        axes.set_yticks(range(len(worst)), [names[index] for index in worst], fontsize=7)
        axes.set_xlabel("found, % of the class; the classes found least often")
    axes.set_title(title)
    with replaced_file(path) as stream:
        figure.savefig(stream, format="png", dpi=100)
