"""Comparison of models with what the official code computed on the same weights (tests/golden, format in parity.py)."""

from __future__ import annotations

from pathlib import Path

import parity
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def load_golden(file: str) -> dict:
    """The golden file of that name, without its ending."""
    return parity.load(GOLDEN / f"{file}.json")


def official_state(golden: dict) -> dict[str, torch.Tensor]:
    """The official state dict that the golden outputs were computed with."""
    return {key: torch.from_numpy(value) for key, value in parity.fill_state(golden["state"]).items()}


def meta_state(file: str) -> dict[str, torch.Tensor]:
    """The official names and shapes of a golden file, without storage."""
    return {key: torch.empty(shape, device="meta") for key, shape in load_golden(file)["state"]}


def stages_and_logits(model: torch.nn.Module, golden: dict) -> dict[str, torch.Tensor]:
    """{"logits", "stage0", ...} of `model` for the input of the golden file."""
    x = torch.from_numpy(parity.fill_input(golden["input"]))
    with torch.inference_mode():
        final, maps = model.forward_intermediates(x)
        return {"logits": model.forward_head(final)} | {f"stage{i}": stage for i, stage in enumerate(maps)}


def assert_parity(got: dict[str, torch.Tensor], golden: dict, tolerance: float | dict[str, float]) -> None:
    """Fails unless `got` has exactly the taps of the golden file, each within the relative error `tolerance`."""
    assert got.keys() == golden["outputs"].keys()
    errors = {tap: parity.relative_error(got[tap].numpy(), want) for tap, want in golden["outputs"].items()}
    allowed = {tap: tolerance[tap] if isinstance(tolerance, dict) else tolerance for tap in errors}
    assert all(errors[tap] <= allowed[tap] for tap in errors), errors
