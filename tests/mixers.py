"""The official outputs of token mixers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import parity
import torch
from torch import nn

from vssm.ops import use_reference


def error_with_official_weights(mixer: nn.Module, golden_file: Path, reference: bool) -> float:
    """Relative error of the output when `mixer` has the weights of `golden_file`, on vssm's ops or their definition."""
    golden = parity.load(golden_file)
    assert sum(p.numel() for p in mixer.parameters()) == golden["params"]
    weights = parity.fill_state(golden["state"])
    mixer.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=True)
    with torch.no_grad(), use_reference() if reference else nullcontext():
        out = mixer(torch.from_numpy(parity.fill_input(golden["input"])))
    return parity.relative_error(out.numpy(), golden["outputs"]["out"])
