"""Parameters and operations of a model, counted the way the papers of this family count them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .ops import flops


@dataclass(frozen=True)
class Complexity:
    """Trainable parameters, and operations of one forward pass in units of 1e9, the "GFLOPs" of the papers."""

    parameters: int
    gflops: float


def complexity(model: nn.Module, input_size: tuple[int, ...]) -> Complexity:
    """Count `model` for one input of `input_size` (C, H, W), or (C, D, H, W), without computing anything.

    As in the papers (and fvcore), a multiplication with its addition counts once in convolutions and matrix products,
    while scans count every operation, 9 for each batch item, step, channel and state (arXiv 2401.10166, section 4).
    Norms, activations, pooling and additions of maps are left out. The model's weights are not touched.

    Raises:
        ValueError: the model refuses this input size.
    """
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    on_meta = model if next(model.parameters()).is_meta else _meta_copy(model)
    scans = {getattr(torch.ops.vssm, name): _counted_twice(formula) for name, formula in flops.PAPERS.items()}
    counter = FlopCounterMode(display=False, custom_mapping=scans)
    training = on_meta.training
    try:
        with torch.no_grad(), counter:
            on_meta.eval()(torch.empty(1, *input_size, device="meta"))
    finally:
        on_meta.train(training)
    return Complexity(parameters, counter.get_total_flops() / 2e9)


def _meta_copy(model: nn.Module) -> nn.Module:
    """`model` without storage, made without ever copying its weights."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, parameters | {id(b): b.to("meta") for b in model.buffers()})


def _counted_twice(formula: Callable[..., int]) -> Callable[..., int]:
    """PyTorch's counter counts 2 for a multiplication with its addition; so must what the total is not halved for."""

    def doubled(*arguments, out_val=None, **options) -> int:
        return 2 * formula(*arguments, **options)

    return doubled
