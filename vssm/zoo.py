"""Facts about published weights, read from model_zoo/*.toml: who published what, where, and which figures.

The files lie in model_zoo/ of a source tree and inside an installed package. Nothing in them was measured here; what
was stands in model_zoo/models.json, which `tools/model_table.py` writes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PACKAGE = Path(__file__).resolve().parent
# In an installed package, and in a source tree.
FOLDERS = (_PACKAGE / "model_zoo", _PACKAGE.parent / "model_zoo")


@dataclass(frozen=True)
class Weights:
    """One published set of weights.

    Attributes:
        name: registered model and tag, "vmamba_tiny.s1l8_in1k".
        family: name of the file that it stands in.
        url: direct download, or "" where there is only a `page`.
        page: where a person finds the file, or "".
        paper: "arXiv:2401.10166".
        repository: of the official code.
        commit: of the official code that these facts were read from.
        code_licence: of the official code, "none stated" where so.
        weights_licence: of the weights, "none stated" where so.
        config: the official configuration, or "".
        top1: published ImageNet-1k accuracy in percent, or None.
        parameters: published count as printed, "30M", or "".
        gflops: published figure, or None.
        gflops_note: why it differs from what `vssm.complexity` counts, or "".
    """

    name: str
    family: str
    url: str
    paper: str
    repository: str
    commit: str
    code_licence: str
    weights_licence: str
    page: str = ""
    config: str = ""
    top1: float | None = None
    parameters: str = ""
    gflops: float | None = None
    gflops_note: str = ""


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
def published() -> dict[str, Weights]:
    """Name with tag -> facts, sorted by name.

    Raises:
        ValueError: a file with an unknown or missing field.
    """
    found = {}
    for path in sorted(folder().glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, facts in content["weights"].items():
            try:
                found[name] = Weights(name=name, family=path.stem, **{**content["source"], **facts})
            except TypeError as error:
                raise ValueError(f"{path}: {name}: {error}") from None
    return dict(sorted(found.items()))


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
