"""Count every registered model, compare it with the official outputs in tests/golden/, and write the model zoo's table.

Examples:
    python tools/model_table.py
    python tools/model_table.py --models 'vssd*'      # count these again, keep the others' rows
    python tools/model_table.py --models ''           # count nothing, write the page anew

Writes model_zoo/models.json (what was counted and measured here) and model_zoo/README.md (that beside what the authors
published, from model_zoo/*.toml, what `tools/evaluate_classifier.py` found, from model_zoo/results.csv, and what other
tools compared, from model_zoo/benchmarks/).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path

import timm
import torch
from tqdm import tqdm

from vssm import zoo
from vssm.atomic import replaced_file
from vssm.checkpoint import load_official
from vssm.classification.results import read_results
from vssm.cli import model_names
from vssm.complexity import complexity

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "model_zoo" / "benchmarks"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "models")]

import families  # noqa: E402
import official  # noqa: E402
import parity  # noqa: E402

NONE = "-"

HEADER = """# Model zoo

Written by `python tools/model_table.py`. The figures the authors published come from the TOML files beside this page,
which also name the official files, configurations, and the terms of code and weights; `vssm zoo list`, `vssm zoo show
NAME` and `vssm zoo get NAME` read them too.

## Classifiers

Backbones registered in timm.

- Parameters and GFLOPs are counted by `vssm.complexity` at the input size; GFLOPs as the papers count them (a
  multiplication with its addition is one operation in products, a scan has 9 for each step, channel and state).
- Published figures and top-1 (ImageNet-1k, percent) are the authors' own.
- Parity is the largest relative error of logits and stages against outputs that the official code computed on the same
  weights (float32, CPU); a dash where there are none of this variant.
- Licence is that of the weights.

"""

DENSE = """
## {title}

{text}

"""
SECTIONS = {
    "detection": ("Detectors", "Mask R-CNN on COCO, as published; the backbone is the registered model."),
    "segmentation": (
        "Segmenters",
        "UPerNet on ADE20K, 160,000 steps, 512 x 512, as published; the backbone is the registered model.",
    ),
    "medical": ("Medical networks", "As published; networks without a row have no published weights."),
}
RESULTS = """
## Evaluated here

By `python tools/evaluate_classifier.py`, from model_zoo/results.csv.

"""
# Written by a tool's --output model_zoo/benchmarks/NAME.
TRAINED = {
    "segmenters-cpu": (
        "Segmentation networks, trained equally long here",
        "Grey and white matter of half a template, Dice on the other half. Other work ran on the machine: processor "
        "seconds compare, wall seconds do not. Time and memory of whole networks at 128 x 128 x 128 beside MONAI's: "
        "[benchmarks/networks-cpu.md](benchmarks/networks-cpu.md).",
    ),
    "digits-cpu": (
        "Classifiers, trained equally long here",
        "Every family and three of timm's own, shrunk to about a third of a million parameters, on scikit-learn's "
        "handwritten digits by one recipe, not tuned to any of them. One seed; a digit is 0.27 %: differences below a "
        "percent mean nothing.",
    ),
}
NO_RESULTS = "Nothing yet: no published weight was downloaded or evaluated here.\n"


def golden_files(name: str) -> list[str]:
    """Golden files that record a whole registered model's logits."""
    files = []
    for path in sorted((ROOT / "tests" / "golden").glob("*.json")):
        golden = json.loads(path.read_text())
        if golden.get("name") == name and "logits" in golden.get("outputs", {}):
            files.append(path.stem)
    return files


def parity_error(name: str, files: list[str]) -> float:
    """Largest relative error over logits and stages of the golden files."""
    worst = 0.0
    for file in files:
        golden = official.load_golden(file)
        model = official.model_of(golden).eval()
        load_official(model, official.official_state(golden))
        got = official.stages_and_logits(model, golden)
        if families.family(name).parallel:
            # Its levels are branches of the last stage, not the stages that the golden file has under these names.
            got = {"logits": got["logits"]}
        errors = (parity.relative_error(value.numpy(), golden["outputs"][tap]) for tap, value in got.items())
        worst = max(worst, *errors)
    return worst


def measure(name: str) -> dict:
    """One row of models.json."""
    with torch.device("meta"):
        model = timm.create_model(name)
    size = timm.get_pretrained_cfg(name).input_size
    counted = complexity(model, size)
    files = golden_files(name)
    return {
        "parameters": counted.parameters,
        "gflops": round(counted.gflops, 3),
        "input_size": list(size),
        "parity": float(f"{parity_error(name, files):.1e}") if files else None,
        "parity_files": files,
    }


def page() -> str:
    """The page, from models.json, the TOML files and results.csv."""
    return HEADER + _classifiers() + "".join(map(_dense, SECTIONS)) + _results() + "".join(map(_trained, TRAINED))


def _classifiers() -> str:
    lines = ["model parameters published GFLOPs published input weights top-1 licence parity".split()]
    for name, row in zoo.measured().items():
        size = " x ".join(map(str, row.input_size[1:]))
        parity_cell = NONE if row.parity is None else f"{row.parity:.1e}"
        for weights in zoo.classifiers(name) or [None]:
            parameters, gflops, top1, licence, link = _published_cells(weights)
            counted = f"{row.parameters:,}", parameters, f"{row.gflops:.2f}", gflops
            lines.append([f"`{name}`", *counted, size, link, top1, licence, parity_cell])
    notes = dict.fromkeys(facts.gflops_note for facts in zoo.published().values() if facts.gflops_note)
    return _markdown(lines) + "\n" + "".join(f"- {note}\n" for note in notes)


def _dense(task: str) -> str:
    """The section of detectors, segmenters or medical networks."""
    title, text = SECTIONS[task]
    rows = zoo.published(task)
    metrics = [key for key in zoo.METRICS if any(key in facts.metrics for facts in rows.values())]
    lines = [
        ["weights", "model", "parameters", "GFLOPs", *(zoo.METRICS[key][0] for key in metrics), "licence", "remark"]
    ]
    for name, facts in rows.items():
        digits = {key: zoo.METRICS[key][1] for key in metrics}
        figures = [f"{facts.metrics[key]:.{digits[key]}f}" if key in facts.metrics else NONE for key in metrics]
        link = f"[{name}]({facts.url or facts.page})"
        counted = facts.parameters or NONE, f"{facts.gflops:g}" if facts.gflops else NONE
        lines.append([link, f"`{facts.model_name}`", *counted, *figures, facts.weights_licence, facts.note])
    return DENSE.format(title=title, text=text) + _markdown(lines)


def _results() -> str:
    rows = read_results(ROOT / "model_zoo" / "results.csv")
    if not rows:
        return RESULTS + NO_RESULTS
    lines = [["weights", "data", "size", "images", "top-1", "top-5", "published top-1", "precision", "device", "date"]]
    for row in rows:
        facts = zoo.published().get(row.weights)
        published = f"{facts.top1:.1f}" if facts and facts.top1 and row.data == "imagenet-val" else NONE
        figures = f"{row.top1:.2f}", f"{row.top5:.2f}", published
        where = row.precision, row.device, row.date
        lines.append([f"`{row.weights}`", row.data, str(row.size), f"{row.images:,}", *figures, *where])
    return RESULTS + _markdown(lines)


def _trained(name: str) -> str:
    """The section of a comparison that a tool wrote."""
    title, text = TRAINED[name]
    report = (BENCHMARKS / f"{name}.md").read_text(encoding="utf-8")
    return f"\n## {title}\n\n{text}\n\n{report}"


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _published_cells(weights: zoo.Weights | None) -> tuple[str, ...]:
    """Parameters, GFLOPs, top-1, licence and link as published."""
    if weights is None:
        return NONE, NONE, NONE, NONE, "none released"
    tag = weights.name.partition(".")[2]
    return (
        weights.parameters or NONE,
        f"{weights.gflops:g}" if weights.gflops else NONE,
        f"{weights.top1:.1f}" if weights.top1 else NONE,
        weights.weights_licence,
        f"[{tag}]({weights.url or weights.page or weights.repository})",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", metavar="PATTERN", help="names to count again (default: all)")
    options = parser.parse_args()
    names = model_names()
    chosen = fnmatch.filter(names, options.models)
    if options.models and not chosen:
        parser.error(f"no registered model fits {options.models!r}")
    path = ROOT / "model_zoo" / "models.json"
    rows = json.loads(path.read_text())["models"] if path.exists() else {}
    rows |= {name: measure(name) for name in tqdm(chosen)}
    rows = {name: rows[name] for name in names if name in rows}
    content = {"written_by": "tools/model_table.py", "models": rows}
    with replaced_file(path) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())
    zoo.measured.cache_clear()
    with replaced_file(ROOT / "model_zoo" / "README.md") as stream:
        stream.write(page().encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
