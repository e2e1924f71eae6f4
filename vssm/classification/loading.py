"""Loaders: which pictures a process sees in which step, and how they are augmented."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from timm.data import IterableImageDataset, create_transform, resolve_data_config
from timm.data.auto_augment import AugmentOp, posterize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .data import Reproducible, order_of_epoch
from .options import ClassifierOptions


def data_config(options: ClassifierOptions, model: nn.Module) -> dict[str, Any]:
    """What pictures must be for the model: input_size, mean, std, crop_pct, interpolation, crop_mode."""
    given = {"crop_pct": options.crop_pct} if options.crop_pct else {}
    if options.interpolation != "random":
        given["interpolation"] = options.interpolation
    size = (3, options.image_size, options.image_size)
    return resolve_data_config({"input_size": size, **given}, model=model)


def training_transform(options: ClassifierOptions, config: dict[str, Any]) -> Any:
    """timm's augmentation: random crop, flip, RandAugment, normalisation, erasing."""
    transform = create_transform(
        config["input_size"],
        is_training=True,
        scale=tuple(options.crop_scale),
        ratio=tuple(options.crop_ratio),
        hflip=0.5 if options.flip else 0.0,
        color_jitter=options.color_jitter or None,
        auto_augment=options.auto_augment or None,
        interpolation=options.interpolation,
        mean=config["mean"],
        std=config["std"],
        re_prob=options.erase_prob,
        re_mode="pixel",
    )
    for op in _augmentations(transform):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    return transform


def _augmentations(transform: Any) -> list[AugmentOp]:
    """The single operations of RandAugment, AutoAugment or AugMix in timm's transform."""
    found = []
    for step in transform.transforms:
        for op in getattr(step, "ops", None) or [op for row in getattr(step, "policy", ()) for op in row]:
            if isinstance(op, AugmentOp):
                found.append(op)
    return found


def _posterize(picture: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, for no bits too: a black picture, as Pillow gave before it refused that (13.0)."""
    return posterize(picture, bits_to_keep) if bits_to_keep else picture.point(lambda value: 0)


def validation_transform(config: dict[str, Any]) -> Any:
    """timm's resizing, centre crop and normalisation."""
    names = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(config["input_size"], **{name: config[name] for name in names})


class TrainingLoader:
    """The batches of a process.

    With R processes, batch B and A accumulated batches, batch a of step s of an epoch holds on process r the places
    (s A + a) R B + r, + r + R, + r + 2 R, ... of the epoch's order: two processes see what one with twice the batch
    sees.

    Streams (`IterableImageDataset`) come in the order their reader gives them; steps that a resumed run has done are
    read and thrown away. Resuming is exact with worker processes: without, the reader shuffles from a state of its own.

    Args:
        pictures: with its transform set.
        pin: memory, for a GPU.
    """

    def __init__(
        self, pictures: Any, options: ClassifierOptions, process: int, processes: int, pin: bool = False
    ) -> None:
        self.pictures, self.options, self.pin = pictures, options, pin
        self.process, self.processes = process, processes
        self.streamed = isinstance(pictures, IterableImageDataset)
        if self.streamed:
            pictures.set_loader_cfg(num_workers=options.workers)
        count, step = len(pictures), options.batch_size * options.accumulation * processes
        if not count and not options.steps_per_epoch:
            raise ValueError("the reader does not know how many pictures there are; set steps_per_epoch")
        self.steps = options.steps_per_epoch or count // step
        if (not self.streamed and self.steps * step > count) or not self.steps:
            raise ValueError(
                f"{count} pictures to train on are fewer than {options.steps_per_epoch or 1} steps of {step}; set a "
                "smaller batch_size"
            )

    def epoch(self, epoch: int, done: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of images (B, 3, H, W) and classes (B,) of an epoch, counted from 0, after its first `done` steps."""
        options, parts = self.options, self.options.accumulation
        settings: dict[str, Any] = {
            "num_workers": options.workers,
            "pin_memory": self.pin,
            # workers must not draw from the generator whose state is part of the checkpoint
            "generator": torch.Generator().manual_seed(options.seed + epoch),
        }
        if self.streamed:
            self.pictures.set_epoch(epoch)
            loader = DataLoader(self.pictures, options.batch_size, drop_last=True, **settings)
            return _named(islice(loader, done * parts, self.steps * parts), options.dataset)
        order = order_of_epoch(len(self.pictures), options.seed, epoch, options.repeats).tolist()
        whole = options.batch_size * self.processes
        batches = [
            [(order[place], epoch, place) for place in range(start + self.process, start + whole, self.processes)]
            for start in range(done * parts * whole, self.steps * parts * whole, whole)
        ]
        return DataLoader(Reproducible(self.pictures, options.seed), batch_sampler=batches, **settings)


def _named(batches: Iterable, dataset: str) -> Iterator:
    """Batches of a stream, with one sentence about what its reader cannot do."""
    try:
        yield from batches
    # what the readers' libraries raise is theirs, and their number is open
    except Exception as error:
        # the last line: a worker process puts a traceback before it; some errors say nothing
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{dataset} cannot be read further: {said}") from error


def validation_loader(
    pictures: Any, options: ClassifierOptions, process: int, processes: int, pin: bool = False
) -> DataLoader:
    """The part of the validation pictures that a process evaluates: every n-th.

    Raises:
        ValueError: there are fewer pictures than processes.
    """
    if not isinstance(pictures, IterableImageDataset):
        if len(pictures) < processes:
            raise ValueError(f"{len(pictures)} pictures to validate on are fewer than the {processes} processes")
        pictures = Subset(pictures, range(process, len(pictures), processes))
    # an own generator: how often one validates, or stops while doing so, must not change what is drawn in training
    return DataLoader(
        pictures,
        options.batch_size,
        num_workers=options.workers,
        pin_memory=pin,
        generator=torch.Generator(),
    )
