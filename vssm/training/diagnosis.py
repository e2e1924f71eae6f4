"""Why a loss or a gradient is not finite: the first broken tensor on the way from the images to the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TrainingError(ArithmeticError):
    """Training met numbers that are not finite; the message says at which step and where."""


def describe_failure(
    step: int, rate: float, network: nn.Module, images: Tensor, outputs: Sequence[Tensor], loss: Tensor
) -> str:
    """One sentence about the first broken tensor: images, weights, a module's output, or a gradient.

    Args:
        step: number of the step, from 1.
        rate: learning rate.
        network: as it was in the step, with the step's gradients if there are some; its forward is run again to find
            the module.
        images, outputs, loss: of the step.
    """
    weights = [name for name, parameter in network.named_parameters() if _broken(parameter)]
    gradients = [name for name, parameter in network.named_parameters() if _broken(parameter.grad)]
    if _broken(images):
        cause = "the images hold values that are not finite; check the data"
    elif weights:
        cause = f"the weights of {weights[0]} and {len(weights) - 1} more are not finite; lower the learning rate"
    elif any(_broken(output) for output in outputs):
        cause = (
            "images and weights are finite, the network's output is not, first behind "
            f"{_first_broken_module(network, images)}; look for an operation that overflows"
        )
    elif _broken(loss):
        cause = "the network's output is finite, the loss is not; check the labels and the weights of the loss"
    else:
        named = gradients[0] if gradients else "no single parameter"
        cause = f"the output is finite, the gradient is not, first in {named}; lower the learning rate"
    return f"training stopped at step {step}: loss {loss.item():g} at learning rate {rate:.2g}; {cause}"


def check_weights(network: nn.Module, step: int) -> None:
    """Raise TrainingError if a weight is not finite, so that no broken checkpoint replaces a good one."""
    for name, parameter in network.named_parameters():
        if _broken(parameter):
            raise TrainingError(
                f"training stopped after step {step}: the weights of {name} are not finite; lower the learning rate"
            )


def _broken(tensor: Tensor | None) -> bool:
    return tensor is not None and not bool(torch.isfinite(tensor).all())


def _first_broken_module(network: nn.Module, images: Tensor) -> str:
    """Name and kind of the module that first returns a value that is not finite in another forward pass."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            tensors = output if isinstance(output, (list, tuple)) else [output]
            if not found and any(isinstance(tensor, Tensor) and _broken(tensor) for tensor in tensors):
                found.append(f"{name or 'the network'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules()]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "an operation that does not overflow again"
