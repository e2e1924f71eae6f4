"""Labelled pictures to train on: folders, tar files and what else timm reads, and scikit-learn's handwritten digits."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset

from .folders import LabelledPictures, class_folder, class_folders
from .options import ClassifierOptions

TRAINING, VALIDATION = "training", "validation"
DIGITS, SYNTHETIC = "digits", "synthetic"
# names of the folder of each part, as ImageNet's users have them
_FOLDERS = {TRAINING: ("train", "training"), VALIDATION: ("val", "validation", "test")}
_STREAMS = ("hfids", "wds", "tfds")
# every fifth picture of each digit is held out
_HELD_OUT = 5


class Digits(Dataset):
    """The 1797 handwritten digits of scikit-learn, 8 x 8 pixels in 17 levels of grey, as RGB pictures.

    Args:
        part: VALIDATION has every fifth picture of each digit, TRAINING the others.
    """

    def __init__(self, part: str) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        held_out = np.zeros(len(found.target), bool)
        for digit in range(10):
            held_out[np.flatnonzero(found.target == digit)[::_HELD_OUT]] = True
        chosen = held_out if part == VALIDATION else ~held_out
        self.pictures = np.round(found.images[chosen] * (255 / 16)).astype(np.uint8)
        self.targets = found.target[chosen].tolist()
        self.transform: Callable = lambda picture: picture

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pictures[index]).convert("RGB")), self.targets[index]


class Synthetic(Dataset):
    """Noise in the number of pictures and classes of ImageNet-1k, for timing: always the same 256 x 256 picture."""

    NUM_CLASSES = 1000

    def __init__(self, part: str) -> None:
        self.count = 1281167 if part == TRAINING else 50000
        self.picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
        self.transform: Callable = lambda picture: picture

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.picture), index % self.NUM_CLASSES


class Reproducible(Dataset):
    """Pictures whose random transform depends on the run's seed, the epoch and the place in it, on nothing else.

    So neither the number of worker processes nor a resumption changes what is learnt from. Items are asked for by
    (index, epoch, place).
    """

    def __init__(self, pictures: Dataset, seed: int) -> None:
        self.pictures, self.seed = pictures, seed

    def __getitem__(self, asked: tuple[int, int, int]) -> tuple[Tensor, int]:
        index, epoch, place = asked
        with drawn_from(self.seed, epoch, place):
            return self.pictures[index]


@contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """Let Python, NumPy and torch draw from generators seeded by `numbers`; afterwards they go on as before."""
    seeds = np.random.SeedSequence(numbers).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def order_of_epoch(pictures: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """Indices of the pictures of an epoch, in order, shape (pictures,).

    A random permutation; with `repeats` above 1 every picture comes as often in succession and the permutation is cut,
    the repeated augmentation of arXiv 1902.05509: processes take every n-th index, so each sees another form.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    return torch.randperm(pictures, generator=generator).repeat_interleave(repeats)[:pictures]


def open_parts(options: ClassifierOptions) -> tuple[Dataset, Dataset, list[str]]:
    """Pictures to train on, to validate on, and the classes where they have names.

    Raises:
        ValueError: as `open_pictures`, or the parts have other classes.
    """
    (training, names), (validation, others) = (open_pictures(options, part) for part in (TRAINING, VALIDATION))
    if names != others:
        strange = next(iter(sorted(set(names) ^ set(others))), "their order")
        raise ValueError(f"{options.data}: training and validation have other classes, {strange} for one; mend them")
    return training, validation, names


def open_pictures(options: ClassifierOptions, part: str) -> tuple[Dataset, list[str]]:
    """A part of the data set that the options name, and its classes where they have names.

    Args:
        part: TRAINING or VALIDATION.

    Returns:
        pictures to index, or an `IterableImageDataset` of timm; each gives (picture, class), with an attribute
        `transform` to be set.

    Raises:
        ValueError: no such data, or no such reader.
    """
    prefix = options.dataset.partition("/")[0].lower()
    if options.data == DIGITS:
        return Digits(part), [str(digit) for digit in range(10)]
    if options.data == SYNTHETIC:
        return Synthetic(part), [str(index) for index in range(Synthetic.NUM_CLASSES)]
    if not options.dataset:
        return _open_files(options, part)
    if prefix not in (*_STREAMS, "hfds"):
        raise ValueError(
            f"option dataset must start with hfds, {', '.join(_STREAMS)} or be empty, got {options.dataset}"
        )
    split = options.train_split if part == TRAINING else options.val_split
    name = options.dataset if "/" in options.dataset else f"{options.dataset}/"
    # what the readers' libraries raise is theirs, and their number is open
    try:
        if prefix == "hfds":
            reader = create_reader(name, root=options.data, split=split)
            return LabelledPictures(options.data, reader), list(reader.class_to_idx)
        streamed = {"is_training": part == TRAINING, "batch_size": options.batch_size, "seed": options.seed}
        stream = IterableImageDataset(options.data, reader=name, split=split, **streamed)
        return stream, list(getattr(stream.reader, "class_to_idx", None) or ())
    except Exception as error:
        raise ValueError(
            f"{options.dataset} cannot be read from {options.data}, part {split}: {type(error).__name__}, {error}"
        ) from error


def _open_files(options: ClassifierOptions, part: str) -> tuple[Dataset, list[str]]:
    root = Path(options.data)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; give one that holds train/ and val/, or set data=digits to try")
    found = [path for name in _FOLDERS[part] for path in (root / name, root / f"{name}.tar") if path.exists()]
    if not found:
        raise ValueError(f"{root} holds none of {', '.join(_FOLDERS[part])}, as folders or .tar files, for {part}")
    if found[0].suffix == ".tar":
        return _open_tar(found[0])
    names = class_folders(found[0])
    return class_folder(found[0], len(names)), names


def _open_tar(path: Path) -> tuple[Dataset, list[str]]:
    try:
        reader = ReaderImageInTar(str(path))
    except (RuntimeError, AssertionError, OSError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read as a tar file of class folders of pictures ({error})") from None
    return LabelledPictures(str(path), reader), list(reader.class_name_to_idx)
