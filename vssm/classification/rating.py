"""One evaluation on one folder at one size, as a row of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path

import timm
import torch
from torch import nn

import vssm

from ..machine import device_name
from .evaluating import evaluate
from .folders import IMAGENET_CLASSES, class_folder, evaluation_loader, imagenet_folder, plain
from .results import Result

# What the data sets are called in results, and whether only the classes that have a folder compete.
DATA_SETS = {
    "imagenet-val": False,
    "imagenet-v2": False,
    "imagenet-a": True,
    "imagenet-r": True,
}


def rate(
    model: nn.Module,
    data: str,
    folder: Path,
    size: int,
    config: Mapping[str, object],
    *,
    weights: str,
    sha256: str = "",
    batch_size: int = 128,
    workers: int = 4,
    amp: torch.dtype | None = None,
    progress: Callable[[Iterable], Iterable] = lambda loader: loader,
) -> Result:
    """Evaluate a classifier on a folder of labelled pictures.

    Args:
        model: on the device it is to run on.
        data: one of DATA_SETS, or any other name of a folder with as many class folders as the model has classes.
        folder: of the pictures.
        size: side of the square pictures in pixels.
        config: as `timm.data.resolve_data_config` gives it.
        weights, sha256: what the row says of the weights.
        batch_size: pictures at once.
        workers: processes that read pictures.
        amp: as in `evaluate`.
        progress: wraps the loader.

    Raises:
        ValueError: the folder, or a picture in it, cannot be used, or the model is none for these classes.
        FloatingPointError: logits that are not finite.
    """
    parameter = next(model.parameters())
    device, classes = parameter.device, None
    if data in DATA_SETS:
        if model.num_classes != IMAGENET_CLASSES:
            raise ValueError(f"{data} needs a model of {IMAGENET_CLASSES} classes, this one has {model.num_classes}")
        dataset, classes = imagenet_folder(folder, part=DATA_SETS[data])
    else:
        dataset = class_folder(folder, model.num_classes)
    loader = evaluation_loader(dataset, config, size, batch_size, device, workers)
    try:
        got = evaluate(model, progress(loader), device, amp, classes)
    except ValueError as error:
        raise plain(error) from None
    return Result(
        weights=weights,
        sha256=sha256,
        data=data,
        size=size,
        images=int(got["count"]),
        top1=round(got["top1"], 3),
        top5=round(got["top5"], 3),
        loss=round(got["loss"], 5),
        crop_pct=float(config["crop_pct"]),
        interpolation=str(config["interpolation"]),
        precision=str(amp or parameter.dtype).removeprefix("torch."),
        device=device_name(device),
        software=f"vssm {vssm.__version__}, timm {timm.__version__}, torch {torch.__version__}",
        date=date.today().isoformat(),
    )
