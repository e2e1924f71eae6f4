"""Rows of evaluations on data sets: one line of a CSV file each, which the model zoo's page reads."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ..atomic import replaced_file


@dataclass(frozen=True)
class Result:
    """One evaluation.

    Attributes:
        weights: row of the zoo ("vmamba_tiny.s1l8_in1k"), or the model's name where the file is not the zoo's.
        sha256: of the file of weights, "" where there is none.
        data: "imagenet-val", "imagenet-v2", "imagenet-a", "imagenet-r", or the name of a folder.
        size: side of the pictures, in pixels.
        images: how many.
        top1, top5: percent.
        loss: mean cross entropy.
        crop_pct: side of the crop by the shorter side of the resized picture.
        interpolation: of the resizing.
        precision: "float32", "bfloat16", "float16".
        device: in words.
        software: versions.
        date: "2026-11-26".
    """

    weights: str
    sha256: str
    data: str
    size: int
    images: int
    top1: float
    top5: float
    loss: float
    crop_pct: float
    interpolation: str
    precision: str
    device: str
    software: str
    date: str

    @property
    def key(self) -> tuple:
        """What a later evaluation of the same replaces."""
        return self.weights, self.data, self.size, self.precision


def read_results(path: Path) -> list[Result]:
    """The rows of a file, none if there is no such file.

    Raises:
        ValueError: columns or values that are not those of a Result.
    """
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    convert = {field.name: kinds[field.type] for field in fields(Result)}
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        if rows.fieldnames != list(convert):
            raise ValueError(f"{path} has the columns {rows.fieldnames}, not those of an evaluation; move it away")
        try:
            return [Result(**{name: kind(row[name]) for name, kind in convert.items()}) for row in rows]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}; correct or remove it") from None


def record(path: Path, results: list[Result]) -> None:
    """Add rows to a file, in place of older ones of the same weights, data, size and precision; sorted.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be written; it then is as it was.
    """
    rows = {result.key: result for result in [*read_results(path), *results]}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Result))
    writer.writerows(astuple(rows[key]) for key in sorted(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as stream:
        stream.write(text.getvalue().encode())


def as_line(row: Result) -> str:
    """A row for the terminal."""
    figures = f"top-1 {row.top1:6.2f} %  top-5 {row.top5:6.2f} %  loss {row.loss:.4f}"
    return f"{row.data:<16} {row.size:>4} px  {row.images:>6} images  {figures}"
