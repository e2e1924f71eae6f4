"""Dice of whole prepared cases, window by window.

Letters: B is the windows of a batch, C the channels, K the labels, x, y, z the voxels of a case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from .planning import Plan
from .preparing import PreparedCase

_WINDOWS = 2


@contextmanager
def one_output(network: nn.Module) -> Iterator[nn.Module]:
    """Evaluate a network, and let one with deep supervision return the highest resolution only."""
    supervised, training = getattr(network, "deep_supervision", None), network.training
    if supervised is not None:
        network.deep_supervision = False
    network.eval()
    try:
        yield network
    finally:
        network.train(training)
        if supervised is not None:
            network.deep_supervision = supervised


@torch.inference_mode()
def predict_case(network: nn.Module, case: PreparedCase, plan: Plan, overlap: float, device: torch.device) -> Tensor:
    """Labels (x, y, z) uint8 or int64 of a prepared case, on the CPU; windows are blended with Gaussian weights."""

    def windows(images: Tensor) -> Tensor:
        return network(images[..., 0])[..., None] if plan.is_flat else network(images)

    with one_output(network):
        logits = sliding_window_inference(
            torch.from_numpy(np.array(case.image))[None],
            plan.patch_size,
            _WINDOWS,
            windows,
            overlap=overlap if not plan.is_flat else (overlap, overlap, 0.0),
            mode="gaussian",
            sw_device=device,
            device=torch.device("cpu"),
        )
    return logits[0].argmax(dim=0)


def case_dice(predicted: Tensor, truth: Tensor, num_labels: int) -> list[float]:
    """Dice 2 |P and T| / (|P| + |T|) of each label but the background; NaN where a label is in neither.

    Args:
        predicted, truth: integers below `num_labels`, of one shape.
    """
    pairs = torch.bincount((truth.long() * num_labels + predicted.long()).flatten(), minlength=num_labels**2)
    pairs = pairs.reshape(num_labels, num_labels).double()
    totals = pairs.sum(dim=0) + pairs.sum(dim=1)
    return (2 * pairs.diagonal() / totals)[1:].tolist()


def mean_dice(scores: list[list[float]]) -> list[float]:
    """Mean of each label over the cases in which it is rated; NaN if there is none."""
    table = np.array(scores, dtype=float)
    rated = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return (np.where(rated, table, 0).sum(axis=0) / rated.sum(axis=0)).tolist()
