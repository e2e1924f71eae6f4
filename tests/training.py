"""A few steps of training, to see whether a network learns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def losses_of_training(
    network: nn.Module, x: Tensor, target: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor], steps: int = 12
) -> list[float]:
    """The loss before each step of AdamW on one batch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
