"""Records of a run: one row per epoch in a CSV file and in TensorBoard, and their curves as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..atomic import replaced_file


class Records:
    """The rows of a run, each on disk as soon as it is added.

    Args:
        folder: gets metrics.csv and tensorboard/.
        columns: names of the numbers in a row; "epoch" must be one.
        done: epochs that are finished; rows of later ones, left by an interrupted run, are removed.
    """

    def __init__(self, folder: Path, columns: Sequence[str], done: int = 0) -> None:
        # imported here: it takes a second, and reading rows does not need it
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        self.columns = tuple(columns)
        kept = [row for row in read_rows(self.path) if row["epoch"] <= done] if done else []
        with replaced_file(self.path) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
            writer = csv.DictWriter(text, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: _exact(row.get(name)) for name in self.columns} for row in kept)
            text.flush()
            text.detach()
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def add(self, row: Mapping[str, float]) -> None:
        """Add a row; columns that are absent stay empty."""
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            csv.DictWriter(stream, self.columns, lineterminator="\n").writerow(
                {name: _exact(row.get(name)) for name in self.columns}
            )
        for name, value in row.items():
            if name != "epoch" and math.isfinite(value):
                self.board.add_scalar(name, value, int(row["epoch"]))
        self.board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        self.board.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv as numbers, without empty fields; none if there is no such file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    # a process killed while it wrote leaves a line without its end: "1" of "12,0.5" is no row of epoch 1
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(whole)]


def draw_curves(path: Path, panels: Mapping[str, Sequence[str]], picture: Path) -> None:
    """Draw columns of metrics.csv against the epoch.

    Args:
        path: metrics.csv.
        panels: title of each panel -> its columns.
        picture: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(path)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for column in columns:
            points = [(row["epoch"], row[column]) for row in rows if column in row]
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                marker="." if len(points) < 50 else None,
                label=column,
            )
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if len(columns) > 1:
            axes.legend(fontsize="small")
    with replaced_file(picture) as stream:
        figure.savefig(stream, format="png", dpi=100)


def _exact(value: float | None) -> str:
    """All digits, so that equal files mean equal numbers."""
    return "" if value is None else repr(int(value) if float(value).is_integer() else float(value))
