"""The snippets of Python in the README."""

from pathlib import Path

import timm
import torch

import vssm

README = Path(__file__).resolve().parents[1] / "README.md"


def snippets(heading: str) -> list[str]:
    """The blocks of Python under a heading of the third level."""
    section = README.read_text(encoding="utf-8").partition(f"\n### {heading}\n")[2].partition("\n## ")[0]
    section = section.partition("\n### ")[0]
    return [part.partition("```")[0] for part in section.split("```python\n")[1:]]


def run(snippet: str) -> dict[str, object]:
    """What the names of a snippet mean at its end; it finds timm, torch and vssm imported."""
    names: dict[str, object] = {"timm": timm, "torch": torch, "vssm": vssm}
    exec(snippet, names)
    return names
