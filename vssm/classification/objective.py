"""What a classifier is trained on: labels, mixed or smoothed, and what a teacher or its own average says.

Letters: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from .options import ClassifierOptions


def make_mixup(options: ClassifierOptions, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix of whole batches, None if the options want neither."""
    if not options.mixup_prob or not (options.mixup or options.cutmix):
        return None
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


class Objective:
    """The loss of a batch.

    - labels: cross entropy, or binary cross entropy of every class;
    - distillation (arXiv 2012.12877) with share s, temperature t, of the model's second classifier z' from a teacher T:
      (1 - s) labels + s CE(z', argmax T) if hard, (1 - s) labels + s t^2 KL(T / t || z' / t) / (B K) if soft: the mean
      over all B K numbers, as its authors' code has it;
    - MESA (arXiv 2205.13535) with weight w: + w CE(z, softmax of the averaged model), from `mesa_start` on.

    Args:
        teacher: in evaluation mode, on the device; for `distillation`.
        average: the averaged model, in evaluation mode; for `mesa`.
        autocast: makes the context in which `average` runs; teachers run in float32.
    """

    def __init__(
        self,
        options: ClassifierOptions,
        teacher: nn.Module | None = None,
        average: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.options, self.teacher, self.average, self.autocast = options, teacher, average, autocast
        if options.loss == "bce":
            self.labels: nn.Module = BinaryCrossEntropy(smoothing=options.smoothing)
        else:
            self.labels = LabelSmoothingCrossEntropy(options.smoothing)
        self.mixed = BinaryCrossEntropy(smoothing=0) if options.loss == "bce" else SoftTargetCrossEntropy()

    def __call__(self, outputs: list[Tensor], targets: Tensor, images: Tensor, progress: float) -> Tensor:
        """The loss, a scalar in float32.

        Args:
            outputs: logits (B, K), and those of the second classifier where the model is distilled.
            targets: classes (B,), or their probabilities (B, K).
            images: (B, 3, H, W), as the model got them.
            progress: share of the training that is done.
        """
        options, logits = self.options, outputs[0].float()
        loss = (self.mixed if targets.is_floating_point() else self.labels)(logits, targets)
        if options.distillation != "none":
            share = options.distillation_share
            loss = (1 - share) * loss + share * self._distilled(outputs[1].float(), images)
        if options.mesa and progress >= options.mesa_start:
            with torch.no_grad(), self.autocast():
                wanted = self.average(images)
            loss = loss + options.mesa * SoftTargetCrossEntropy()(logits, wanted.float().softmax(dim=-1))
        return loss

    def _distilled(self, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(images)
        if self.options.distillation == "hard":
            return F.cross_entropy(logits, wanted.argmax(dim=1))
        temperature = self.options.distillation_temperature
        student, teacher = ((z / temperature).log_softmax(dim=1) for z in (logits, wanted))
        return F.kl_div(student, teacher, reduction="sum", log_target=True) / student.numel() * temperature**2
