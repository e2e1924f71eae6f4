"""Recording what the parts of a network give out during a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def recording(parts: dict[str, torch.nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """The dictionary into which every module of `parts` writes its output, under its name, within the context."""
    outputs = {}
    hooks = [
        part.register_forward_hook(lambda _module, _inputs, out, tap=tap: outputs.update({tap: out.detach().clone()}))
        for tap, part in parts.items()
    ]
    yield outputs
    for hook in hooks:
        hook.remove()
