"""An evaluation as files: a row per case and label, a summary, a box plot."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from matplotlib.figure import Figure

from .evaluation import METRICS, Rating, Summary
from .writing import atomic_file

_TITLES = {
    "dice": "Dice",
    "surface_dice": "surface Dice",
    "hausdorff95_mm": "Hausdorff 95 % (mm)",
    "volume_difference_ml": "volume difference (ml)",
    "lesion_f1": "lesion F1",
}


def write_report(
    ratings: Sequence[Rating], summaries: Sequence[Summary], tolerance_mm: float, folder: str | Path
) -> list[Path]:
    """Write cases.csv, summary.json and boxplot.png into `folder`, which is made if it does not exist.

    In the JSON a value that is not a number is null and an infinite one the string "inf".

    Raises:
        VolumeError: a file cannot be written; the others are left whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("cases.csv", "summary.json", "boxplot.png")]
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Rating)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(rating) for rating in ratings)
    content = {
        "surface_tolerance_mm": tolerance_mm,
        "interval": "95 % bootstrap interval of the mean over cases, percentile method",
        "summary": [{key: _plain(value) for key, value in asdict(summary).items()} for summary in summaries],
    }
    for path, text in zip(paths, (table.getvalue(), json.dumps(content, indent=1) + "\n"), strict=False):
        with atomic_file(path) as stream:
            stream.write(text.encode())
    figure = draw_boxes(ratings)
    with atomic_file(paths[2]) as stream:
        figure.savefig(stream, format="png", dpi=110)
    return paths


def draw_boxes(ratings: Sequence[Rating]) -> Figure:
    """A panel for each metric, a box for each label over its cases, every case a dot; infinite values are left out."""
    labels = sorted({(rating.label, rating.name) for rating in ratings})
    figure = Figure(figsize=(3.2 * len(METRICS), 1.2 + 0.5 * max(4, len(labels))), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        columns = []
        for label, _ in labels:
            values = [getattr(rating, metric) for rating in ratings if rating.label == label]
            columns.append([value for value in values if math.isfinite(value)])
        panel.boxplot(columns, orientation="horizontal", widths=0.5, showfliers=False)
        for place, values in enumerate(columns, start=1):
            panel.plot(values, [place] * len(values), "o", alpha=0.5, markersize=4)
        panel.set_yticks(range(1, len(labels) + 1), [name for _, name in labels])
        panel.set_title(_TITLES[metric], fontsize=10)
        if metric in ("dice", "surface_dice", "lesion_f1"):
            panel.set_xlim(-0.02, 1.02)
    return figure


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
