"""Accuracy and loss of a classifier over a loader of labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    amp: torch.dtype | None = None,
    classes: Sequence[int] | None = None,
    confusion: Tensor | None = None,
) -> dict[str, float]:
    """Classify all images of `loader` and compare with their targets; the model's mode is restored afterwards.

    Args:
        model: already on `device`; gives logits (B, K), in evaluation mode.
        loader: gives batches of images (B, C, H, W) and targets (B,), each an index into the logits, or into
            `classes`.
        device: the batches are moved there.
        amp: torch.bfloat16 or torch.float16 to run the model under autocast, None for the type of its weights.
        classes: indices of the only logits that compete, for data sets with a part of the classes (ImageNet-A, -R).
        confusion: (K, K), int64, on the CPU, to which 1 is added at (target, highest logit) of every image.

    Returns:
        top1 and top5: percentage of the images with the target among the highest and the five highest logits (or as
            many as there are); loss: mean cross entropy in float32; count: images. Results of parts of a data set
            combine as means weighted by their counts.

    Raises:
        ValueError: the loader is empty, or a target is not one of the classes.
        FloatingPointError: logits that are not finite.
    """
    device = torch.device(device)
    chosen = None if classes is None else torch.as_tensor(classes, device=device)
    # sums stay on the device, so that the host waits once a batch for the check alone
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    count = 0
    training = model.training
    model.eval()
    try:
        for images, targets in loader:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(images)
            logits = logits.float() if chosen is None else logits.float()[:, chosen]
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError(
                    f"logits are not finite after {count} images; evaluate without amp, or check the weights"
                )
            if int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]:
                raise ValueError(
                    f"targets must be below the {logits.shape[1]} classes of the model, got {int(targets.min())} to "
                    f"{int(targets.max())}; check num_classes and the class folders"
                )
            found = logits.topk(min(5, logits.shape[1]), dim=1).indices
            if confusion is not None:
                confusion += torch.bincount(
                    targets.cpu() * logits.shape[1] + found[:, 0].cpu(), minlength=confusion.numel()
                ).view_as(confusion)
            best = found == targets[:, None]
            hits += torch.stack([best[:, 0].sum(), best.sum()])
            loss += F.cross_entropy(logits, targets, reduction="sum").to(loss)
            count += len(targets)
    finally:
        model.train(training)
    if count == 0:
        raise ValueError("there are no images to evaluate; check the data set")
    top1, top5 = (100 * hits / count).tolist()
    return {"top1": top1, "top5": top5, "loss": loss.item() / count, "count": count}
