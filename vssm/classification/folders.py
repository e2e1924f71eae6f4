"""Folders of labelled pictures to evaluate on: ImageNet-1k's validation set, -V2, -A, -R, and any classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader

IMAGENET_CLASSES = 1000


class LabelledPictures(ImageDataset):
    """timm's dataset, but a picture that cannot be read is an error, not replaced by the next one."""

    def __getitem__(self, index: int) -> tuple[object, int]:
        stream, target = self.reader[index]
        try:
            with stream, Image.open(stream) as picture:
                picture = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = self.filename(index, absolute=True)
            raise ValueError(f"{name} cannot be read as a picture ({error}); restore or remove it") from None
        return self.transform(picture), target


def plain(error: ValueError) -> ValueError:
    """An error from a loader without the traceback that a process that reads pictures puts before its sentence."""
    return ValueError(str(error).rpartition("ValueError: ")[2].strip())


def imagenet_folder(root: Path, part: bool = False) -> tuple[LabelledPictures, list[int] | None]:
    """Pictures in one folder per class of ImageNet-1k.

    Args:
        root: its folders are called by WordNet's number ("n01440764") or, as in ImageNet-V2, by the index of the class
            in the order of those ("0" to "999").
        part: only the classes with a folder compete, as ImageNet-A and -R are evaluated.

    Returns:
        the data set, and the indices of the classes that compete, in the order of the targets; None if all 1000 do,
        the targets are then indices of classes.

    Raises:
        ValueError: no such folder, a folder that is no class, or no pictures.
    """
    folders = class_folders(root)
    numbers = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
    indices = {str(index): index for index in numbers.values()}
    known = numbers if folders[0] in numbers else indices
    strange = [name for name in folders if name not in known]
    if strange:
        raise ValueError(
            f"{root}: {strange[0]} is no class of ImageNet-1k; its folders must be called n01440764 and so on, or 0 to "
            "999 as in ImageNet-V2"
        )
    classes = sorted(known[name] for name in folders)
    if part:
        return _pictures(root, {name: classes.index(known[name]) for name in folders}), classes
    return _pictures(root, {name: known[name] for name in folders}), None


def class_folder(root: Path, num_classes: int) -> LabelledPictures:
    """Pictures in one folder per class, numbered in natural order of the folders' names, as timm trains on them.

    Raises:
        ValueError: no such folder, another number of classes than the model's, or no pictures.
    """
    folders = class_folders(root)
    if len(folders) != num_classes:
        raise ValueError(f"{root} has {len(folders)} class folders, the model has {num_classes} classes")
    return _pictures(root, {name: index for index, name in enumerate(folders)})


def evaluation_loader(
    dataset: LabelledPictures,
    config: Mapping[str, object],
    size: int,
    batch_size: int,
    device: torch.device,
    workers: int = 4,
) -> DataLoader:
    """timm's loader with the transform of an evaluation: resize, centre crop, normalise.

    Args:
        config: as `timm.data.resolve_data_config` gives it; of it interpolation, mean, std, crop_pct and crop_mode.
        size: side of the square that the model gets, in pixels.
    """
    settings = {key: config[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    return create_loader(
        dataset,
        (3, size, size),
        batch_size,
        num_workers=workers,
        persistent_workers=False,
        device=device,
        use_prefetcher=device.type == "cuda",
        pin_memory=device.type == "cuda",
        **settings,
    )


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, in natural order.

    Raises:
        ValueError: no such folder, or none in it.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; give one that holds a folder of pictures per class")
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise ValueError(f"{root} holds no folders; the pictures must be in one folder per class")
    return sorted(names, key=natural_key)


def _pictures(root: Path, class_map: dict[str, int]) -> LabelledPictures:
    try:
        return LabelledPictures(str(root), ReaderImageFolder(str(root), class_map=class_map))
    except RuntimeError:
        raise ValueError(f"{root} holds no pictures in its class folders") from None
