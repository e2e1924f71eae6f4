"""Benchmarks of timm models against timm's own: inference, training step, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from measuring import peak_memory, take_turns
from torch.nn.functional import cross_entropy

import vssm  # noqa: F401  registers the models

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny", "deit_small_patch16_224")
PASSES = ("inference", "training step")
# Peers that want their size when they are made.
_SIZED = ("swin_", "deit_")


def model_call(name: str, resolution: int, batch: int, what: str, device: str) -> Callable[[], Any]:
    """A pass of the model over random pictures as a call without arguments, float32."""
    torch.manual_seed(0)
    arguments = {"img_size": resolution} if name.startswith(_SIZED) else {}
    model = timm.create_model(name, num_classes=1000, **arguments).to(device)
    pictures = torch.randn(batch, 3, resolution, resolution, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    if what == "inference":
        model.eval()

        def infer() -> None:
            with torch.inference_mode():
                model(pictures)

        return infer
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(pictures), labels).backward()
        optimizer.step()

    return train


def speed(names: list[str], resolutions: list[int], batch: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of times of each model; ratios are to the first."""
    rows = []
    for resolution in resolutions:
        for what in PASSES:
            calls = {name: model_call(name, resolution, batch, what, device.type) for name in names}
            times = take_turns(calls, device, seconds=4.0, least=5, most=30)
            for name, time in times.items():
                row = {"resolution": resolution, "batch": batch, "pass": what, "model": name, "ms": time}
                row["pictures per s"] = f"{batch * 1e3 / time.median:.3g}"
                rows.append(row | {f"time / {names[0]}": f"{time.median / times[names[0]].median:.2f}"})
    return rows


def memory(names: list[str], resolution: int, batch: int, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """Rows of the memory of a training step beyond weights and pictures."""
    rows = []
    for name in names:
        peak = peak_memory(model_call, (name, resolution, batch, "training step", device.type), threads)
        if peak is not None:
            rows.append({"model": name, "resolution": resolution, "batch": batch, "GB": f"{peak / 1e9:.3f}"})
    return rows
