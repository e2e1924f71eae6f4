"""Count every registered model, compare it with the official outputs in tests/golden/, and write the model zoo's table.

Examples:
    python tools/model_table.py
    python tools/model_table.py --models 'vssd*'      # count these again, keep the others' rows

Writes model_zoo/models.json (what was counted and measured here) and model_zoo/README.md (that beside what the authors
published, from model_zoo/*.toml).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from pathlib import Path

import timm
import torch
from tqdm import tqdm

from vssm import zoo
from vssm.checkpoint import load_official
from vssm.cli import model_names
from vssm.complexity import complexity

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "models")]

import families  # noqa: E402
import official  # noqa: E402
import parity  # noqa: E402

NONE = "-"

HEADER = """# Model zoo

Backbones registered in timm. Written by `python tools/model_table.py`; the figures the authors published come from the
TOML files beside this page, which also name the official files.

- Parameters and GFLOPs are counted by `vssm.complexity` at the input size; GFLOPs as the papers count them (a
  multiplication with its addition is one operation in products, a scan has 9 for each step, channel and state).
- Published figures and top-1 (ImageNet-1k, percent) are the authors' own. **No published weight was downloaded or
  evaluated here.**
- Parity is the largest relative error of logits and stages against outputs that the official code computed on the same
  weights (float32, CPU); a dash where there are none of this variant.
- Licence is that of the weights.

"""


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


def table() -> str:
    """The page, from models.json and the TOML files."""
    head = "model parameters published GFLOPs published input weights top-1 licence parity".split()
    lines = [head, ["---"] * len(head)]
    for name, row in zoo.measured().items():
        size = " x ".join(map(str, row.input_size[1:]))
        parity_cell = NONE if row.parity is None else f"{row.parity:.1e}"
        for weights in [
            facts for key, facts in zoo.published("classification").items() if key.split(".")[0] == name
        ] or [None]:
            parameters, gflops, top1, licence, link = _published_cells(weights)
            counted = f"{row.parameters:,}", parameters, f"{row.gflops:.2f}", gflops
            lines.append([f"`{name}`", *counted, size, link, top1, licence, parity_cell])
    notes = dict.fromkeys(facts.gflops_note for facts in zoo.published().values() if facts.gflops_note)
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return HEADER + rows + "\n\n" + "".join(f"- {note}\n" for note in notes)


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


def write(path: Path, text: str) -> None:
    """Replace a file at once, so that an interruption leaves the old one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", metavar="PATTERN", help="names to count again (default: all)")
    options = parser.parse_args()
    names = model_names()
    chosen = fnmatch.filter(names, options.models)
    if not chosen:
        parser.error(f"no registered model fits {options.models!r}")
    path = ROOT / "model_zoo" / "models.json"
    rows = json.loads(path.read_text())["models"] if path.exists() else {}
    rows |= {name: measure(name) for name in tqdm(chosen)}
    rows = {name: rows[name] for name in names if name in rows}
    write(path, json.dumps({"written_by": "tools/model_table.py", "models": rows}, indent=1) + "\n")
    zoo.measured.cache_clear()
    write(ROOT / "model_zoo" / "README.md", table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
