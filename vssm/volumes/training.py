"""Training a segmentation network on patches: where patches lie, the loss, the schedule, averaged weights.

Letters: B is the batch, K the labels, X, Y, Z the voxels of a volume, x, y, z those of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..training.diagnosis import TrainingError, describe_failure

__all__ = ["PatchSampler", "Recipe", "Step", "TrainingError", "dice_scores", "fit"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        steps: number of batches.
        learning_rate: highest rate of AdamW's one-cycle schedule.
        warmup: share of the steps in which the rate rises; it falls along a cosine afterwards.
        weight_decay: of AdamW, on every parameter.
        max_gradient: norm to which longer gradients are cut.
        average_decay: share of the averaged weights that a step keeps; the average is the result.
    """

    steps: int
    learning_rate: float
    warmup: float
    weight_decay: float
    max_gradient: float
    average_decay: float


@dataclass(frozen=True)
class Step:
    """What one step of `fit` saw: its number from 1, the loss, and the Dice of each label but the background."""

    number: int
    loss: float
    dice: tuple[float, ...]


class PatchSampler:
    """Draws where patches lie: around a random labelled voxel, or, so that empty regions are known too, anywhere.

    Args:
        labels: (X, Y, Z) integers, 0 is background.
        size: (x, y, z) of a patch in voxels.
        anywhere: share of the patches that lie anywhere, 0 to 1.
        generator: source of the random numbers, on the CPU.

    Raises:
        ValueError: a patch is larger than the volume, or nothing is labelled.
    """

    def __init__(self, labels: Tensor, size: Sequence[int], anywhere: float, generator: torch.Generator) -> None:
        if len(size) != labels.ndim or any(side > whole for side, whole in zip(size, labels.shape, strict=True)):
            raise ValueError(f"patches of {tuple(size)} do not fit into a volume of {tuple(labels.shape)}; reduce them")
        self.labelled = labels.nonzero()
        if len(self.labelled) == 0:
            raise ValueError("labels hold background only; patches need something to learn")
        self.room = torch.tensor(labels.shape) - torch.tensor(size)
        self.size = tuple(size)
        self.anywhere = anywhere
        self.generator = generator

    def __call__(self) -> tuple[slice, ...]:
        """Slices of the next patch."""
        chance = torch.rand(4, generator=self.generator)
        if chance[0] < self.anywhere:
            corner = (chance[1:] * (self.room + 1)).long()
        else:
            centre = self.labelled[int(chance[1] * len(self.labelled))]
            corner = (centre - torch.tensor(self.size) // 2).clamp(min=0).minimum(self.room)
        return tuple(slice(start, start + side) for start, side in zip(corner.tolist(), self.size, strict=True))


def dice_scores(predicted: Tensor, truth: Tensor, num_labels: int) -> tuple[float, ...]:
    """Dice overlap 2 |P and T| / (|P| + |T|) of each label but the background; 1 where both are empty.

    Args:
        predicted, truth: integers of one shape.
        num_labels: K, the background included.
    """
    scores = []
    for label in range(1, num_labels):
        found, known = predicted == label, truth == label
        total = int(found.sum() + known.sum())
        scores.append(2 * int((found & known).sum()) / total if total else 1.0)
    return tuple(scores)


def fit(
    network: nn.Module,
    next_batch: Callable[[], tuple[Tensor, Tensor]],
    recipe: Recipe,
    on_step: Callable[[Step], None] = lambda step: None,
) -> nn.Module:
    """Train a network with Dice plus cross-entropy (background left out of the Dice part).

    Args:
        network: (B, 1, x, y, z) to logits (B, K, x, y, z); it is changed.
        next_batch: gives images (B, 1, x, y, z) float32 and labels (B, 1, x, y, z) int64.
        recipe: how long and how fast.
        on_step: called after each step, for a progress bar.

    Returns:
        A copy of the network with averaged weights, in evaluation mode.

    Raises:
        TrainingError: the loss or a gradient is not finite.
    """
    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warmup, div_factor=10
    )
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay))
    network.train()
    for number in range(1, recipe.steps + 1):
        images, labels = next_batch()
        logits = network(images)
        loss = loss_of(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(network.parameters(), recipe.max_gradient)
        if not (torch.isfinite(loss) and torch.isfinite(gradient)):
            rate = schedule.get_last_lr()[0]
            raise TrainingError(describe_failure(number, rate, network, images, [logits], loss))
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        scores = dice_scores(logits.argmax(dim=1), labels[:, 0], logits.shape[1])
        on_step(Step(number, loss.item(), scores))
    return average.module.eval()
