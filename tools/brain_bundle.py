"""Writing the trained network of the demonstration as a MONAI bundle, with the numbers measured in the same run."""

import io
import json
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from torch import Tensor

import vssm
from vssm.volumes.writing import atomic_file

_DEFINITION = "configs/inference.json"
_METADATA = "configs/metadata.json"
_CARD = "docs/README.md"
_MEASURED = "## Measured\n"


def write_bundle(
    source: Path,
    folder: Path,
    weights: dict[str, Tensor],
    learned_from: dict[str, Any],
    report: dict[str, Any] | None = None,
) -> None:
    """Write a bundle like `source` with other weights.

    Args:
        source: folder of the bundle whose definition, licence and card are taken.
        folder: folder to write; it may be `source` itself.
        weights: state dict of the trained network.
        learned_from: extent and foreground of the scans it learned from, as `vssm.volumes.load_bundle` reads them.
        report: of the run; without it the bundle states no figures.
    """
    metadata = json.loads((source / _METADATA).read_text(encoding="utf-8"))
    metadata |= {
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"vssm": vssm.__version__},
        "eval_metrics": _metrics(report) if report else {},
        "learned_from": learned_from,
    }
    card = (source / _CARD).read_text(encoding="utf-8").partition(_MEASURED)[0]
    packed = io.BytesIO()
    torch.save(weights, packed)
    contents = {
        "LICENSE": (source / "LICENSE").read_bytes(),
        _DEFINITION: (source / _DEFINITION).read_bytes(),
        _METADATA: json.dumps(metadata, indent=4).encode() + b"\n",
        _CARD: (card + _MEASURED + _measured(report) if report else card).encode(),
        "models/model.pt": packed.getvalue(),
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream:
            stream.write(content)


def _metrics(report: dict[str, Any]) -> dict[str, float]:
    return {f"dice_{tissue}_held_out": value for tissue, value in report["dice"].items()}


def _measured(report: dict[str, Any]) -> str:
    rows = {
        "two thresholds": report["baselines"]["threshold"],
        "two thresholds after Gaussian smoothing": report["baselines"]["smoothed_threshold"],
        f"same network without Mamba ({report['parameters']['control']:,} parameters)": report["control"],
        f"this network ({report['parameters']['network']:,} parameters)": report["dice"],
    }
    table = "\n".join(f"| {name} | {dice['gm']:.3f} | {dice['wm']:.3f} |" for name, dice in rows.items())
    options, versions = report["options"], report["versions"]
    return (
        f"\nOn {report['date']}, {report['machine']}, {report['threads']} threads, torch {versions['torch']}, "
        f"MONAI {versions['monai']}, in {report['seconds']:.0f} s (both trainings and all measurements), by\n\n"
        f"    {report['command']}\n\n"
        f"Dice on the held-out hemisphere of one scan at {100 * options['noise']:g} % noise and "
        f"{100 * options['nonuniformity']:g} % non-uniformity (seed {options['evaluation_seed']}); "
        f"{options['steps']} steps each:\n\n"
        f"| method | grey matter | white matter |\n| --- | --- | --- |\n{table}\n"
    )
