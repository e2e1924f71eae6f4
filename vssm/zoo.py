"""Facts about published weights, read from model_zoo/*.toml: who published what, where, and which figures.

The files lie in model_zoo/ of a source tree and inside an installed package. Nothing in them was measured here; what
was stands in model_zoo/models.json, which `tools/model_table.py` writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PACKAGE = Path(__file__).resolve().parent
# In an installed package, and in a source tree.
FOLDERS = (_PACKAGE / "model_zoo", _PACKAGE.parent / "model_zoo")


# Tasks, and what a row may publish for them: name -> (what it is called, digits after the point).
TASKS = ("classification", "detection", "segmentation", "medical")
METRICS = {
    "top1": ("ImageNet-1k top-1, %", 1),
    "box_ap": ("COCO box AP", 1),
    "box_ap50": ("COCO box AP at IoU 0.50", 1),
    "box_ap75": ("COCO box AP at IoU 0.75", 1),
    "mask_ap": ("COCO mask AP", 1),
    "mask_ap50": ("COCO mask AP at IoU 0.50", 1),
    "mask_ap75": ("COCO mask AP at IoU 0.75", 1),
    "miou_ss": ("ADE20K mIoU, single scale, %", 1),
    "miou_ms": ("ADE20K mIoU, multi-scale, %", 1),
    "miou": ("mIoU", 5),
    "dsc": ("Dice", 5),
}


@dataclass(frozen=True)
class Weights:
    """One published set of weights.

    Attributes:
        name: model and tag, "vmamba_tiny.s1l8_in1k"; of a classifier the name registered with timm.
        family: name of the file that it stands in.
        url: direct download, or "" where there is only a `page`.
        paper: "arXiv:2401.10166".
        repository: of the official code.
        commit: of the official code that these facts were read from.
        code_licence: of the official code, "none stated" where so.
        weights_licence: of the weights, "none stated" where so.
        task: one of TASKS.
        model: what vssm calls the model: a registered name (of the backbone in a detector or segmenter) or a network of
            `vssm.networks`; "" for the part of `name` before the dot.
        arguments: of the network.
        input_size: (C, H, W) that the network takes in the authors' evaluation; of registered models timm knows it.
        page: where a person finds the file, or "".
        file: name of the file behind a page, or "" where it is not stated.
        wrapper: key of the weights inside the file, "top level", or "not stated".
        config: our configuration that trains it, below the root of the source tree, or "".
        official_config: the authors', below the root of their repository, or "".
        metrics: published figures, named in METRICS.
        parameters: published count as printed, "30M", or "".
        gflops: published figure, or None.
        gflops_note: why it differs from what `vssm.complexity` counts, or "".
        note: what else one has to know, or "".
        sha256: of the file in hexadecimal, or "" where the authors publish none.
        bytes: of the file, or None where not known.
    """

    name: str
    family: str
    url: str
    paper: str
    repository: str
    commit: str
    code_licence: str
    weights_licence: str
    task: str = "classification"
    model: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)
    input_size: Sequence[int] = ()
    page: str = ""
    file: str = ""
    wrapper: str = "not stated"
    config: str = ""
    official_config: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: str = ""
    gflops: float | None = None
    gflops_note: str = ""
    note: str = ""
    sha256: str = ""
    bytes: int | None = None

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if unknown := self.metrics.keys() - METRICS.keys():
            raise ValueError(f"unknown metrics {', '.join(sorted(unknown))}; there are {', '.join(METRICS)}")

    @property
    def model_name(self) -> str:
        """What vssm calls the model."""
        return self.model or self.name.partition(".")[0]

    @property
    def file_name(self) -> str:
        """Name of the published file, or "" where it is not stated."""
        return self.file or PurePosixPath(unquote(urlsplit(self.url).path)).name

    @property
    def top1(self) -> float | None:
        """Published ImageNet-1k accuracy in percent."""
        return self.metrics.get("top1")

    @property
    def figures(self) -> str:
        """The published figures in words."""
        return "; ".join(f"{value:.{METRICS[key][1]}f} ({METRICS[key][0]})" for key, value in self.metrics.items())


@dataclass(frozen=True)
class Measured:
    """What was counted or measured of a registered model.

    Attributes:
        parameters: trainable parameters.
        gflops: operations at `input_size`, see `vssm.complexity`.
        input_size: (C, H, W).
        parity: largest relative error against outputs of the official code on the same weights, or None if there are
            no such outputs of this model.
        parity_files: golden files compared.
    """

    parameters: int
    gflops: float
    input_size: tuple[int, int, int]
    parity: float | None
    parity_files: tuple[str, ...]


def folder() -> Path:
    """Where the facts lie.

    Raises:
        FileNotFoundError: neither in the package nor beside it.
    """
    for candidate in FOLDERS:
        if any(candidate.glob("*.toml")):
            return candidate
    raise FileNotFoundError(f"no model_zoo/*.toml in {' or '.join(map(str, FOLDERS))}; reinstall vssm")


@cache
def published(task: str | None = None) -> dict[str, Weights]:
    """Name with tag -> facts, sorted by name; of one task if given.

    Raises:
        ValueError: a file with an unknown or missing field.
    """
    if task is not None:
        return {name: facts for name, facts in published().items() if facts.task == task}
    found = {}
    for path in sorted(folder().glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, facts in content["weights"].items():
            try:
                found[name] = Weights(name=name, family=path.stem, **{**content["source"], **facts})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {name}: {error}") from None
    return dict(sorted(found.items()))


def classifiers(model: str) -> list[Weights]:
    """The published weights of a registered model, whole with their classifier."""
    return [facts for facts in published("classification").values() if facts.model_name == model]


@cache
def measured() -> dict[str, Measured]:
    """Registered name -> what was counted; empty if the file has not been written."""
    path = folder() / "models.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["models"]
    return {
        name: Measured(**{**row, "input_size": tuple(row["input_size"]), "parity_files": tuple(row["parity_files"])})
        for name, row in rows.items()
    }
