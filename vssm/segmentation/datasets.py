"""What there is to train on: nnU-Net raw folders, datalists in the Decathlon's style, plain pairs of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monai.data import partition_dataset

from ..volumes.errors import VolumeError
from ..volumes.json_files import read_json_object
from ..volumes.reading import SUFFIXES

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_FOLDER_NAMES = (("imagesTr", "labelsTr"), ("images", "labels"), ("images", "masks"))


@dataclass(frozen=True)
class Case:
    """One case: its name, the files of its channels in order, and its label map."""

    name: str
    images: tuple[Path, ...]
    labels: Path

    @property
    def is_picture(self) -> bool:
        """Whether the files are 2-D pictures (PNG, JPEG, ...) and not NIfTI volumes."""
        return self.labels.name.lower().endswith(PICTURE_SUFFIXES)


@dataclass(frozen=True)
class Dataset:
    """Cases and what their channels and labels mean.

    Attributes:
        name: for people.
        channels: name of each image channel; "CT" asks for CT normalisation.
        labels: name of each label value 0, 1, 2, ...; `labels[0]` is the background.
        cases: sorted by name.
    """

    name: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[Case, ...]

    @property
    def is_pictures(self) -> bool:
        """Whether the cases are 2-D pictures."""
        return self.cases[0].is_picture


def read_dataset(
    path: str | Path, channels: Sequence[str] = (), labels: Mapping[int, str] | None = None, label_suffix: str = ""
) -> Dataset:
    """Find the training cases under `path` and check that each has its label map.

    Args:
        path: an nnU-Net raw folder (dataset.json with `channel_names`, imagesTr, labelsTr); a folder or file with a
            datalist in the style of the Medical Segmentation Decathlon (`training`: [{"image": ..., "label": ...}]);
            or a folder with images/ and labels/ (or masks/, or imagesTr/ and labelsTr/) whose files have equal names.
        channels, labels: names that win over those of dataset.json; plain pairs need them.
        label_suffix: of plain pairs, what a label map's name has behind the image's, for example "_segmentation".

    Raises:
        VolumeError: one sentence: the folder or a file is missing or unreadable, a case lacks its label map, or the
            labels are not numbered 0, 1, 2, ...
    """
    path = Path(path)
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder; check the name")
    listing = path / "dataset.json" if path.is_dir() else path
    if listing.is_file():
        dataset = _listed(listing)
    elif path.is_dir():
        dataset = Dataset(path.resolve().name, ("image",), (), _pairs(path, label_suffix))
    else:
        raise VolumeError(f"{path}: is not an ordinary file; give a dataset's folder or its JSON list")
    dataset = replace(dataset, channels=tuple(channels) or dataset.channels)
    if labels:
        dataset = replace(dataset, labels=_label_names(path, {name: label for label, name in labels.items()}))
    if not dataset.labels:
        raise VolumeError(f"{path}: has no dataset.json that names the labels; name them in the option `labels`")
    if not dataset.cases:
        raise VolumeError(f"{path}: holds no training case; images and label maps are needed")
    for case in dataset.cases:
        for file in (*case.images, case.labels):
            if not file.is_file():
                kind = "label map" if file == case.labels else "image"
                raise VolumeError(f"{file}: the {kind} of case {case.name} is missing; add it or take the case out")
    if len({case.is_picture for case in dataset.cases}) > 1:
        raise VolumeError(f"{path}: mixes pictures and volumes; make two datasets of them")
    return replace(dataset, cases=tuple(sorted(dataset.cases, key=lambda case: case.name)))


def split_folds(cases: Sequence[Case], folds: int, fold: int, seed: int) -> tuple[list[Case], list[Case]]:
    """Cases to train on and cases to validate on.

    Args:
        folds: how many equal parts the shuffled cases are cut into.
        fold: the part to validate on, from 0; -1 trains and validates on every case.
        seed: of the shuffle.

    Raises:
        VolumeError: fewer cases than folds, or a fold that does not exist.
    """
    if fold == -1:
        return list(cases), list(cases)
    if not 2 <= folds <= len(cases):
        raise VolumeError(
            f"{len(cases)} cases cannot be cut into {folds} folds; set folds from 2 to the cases, or fold -1"
        )
    if not 0 <= fold < folds:
        raise VolumeError(f"fold {fold} does not exist; there are 0 to {folds - 1}, and -1 for all cases")
    parts = partition_dataset(list(cases), num_partitions=folds, shuffle=True, seed=seed)
    return [case for index, part in enumerate(parts) if index != fold for case in part], list(parts[fold])


def _listed(path: Path) -> Dataset:
    content = read_json_object(path, "check its permissions")
    numbered = content.get("channel_names", content.get("modality", {"0": "image"}))
    if not isinstance(numbered, dict) or sorted(numbered) != sorted(map(str, range(len(numbered)))):
        raise VolumeError(f"{path}: channel_names must number the channels '0', '1', ..., got {numbered}; correct it")
    channels = tuple(str(numbered[str(index)]) for index in range(len(numbered)))
    labels = content.get("labels", {})
    if not isinstance(labels, dict):
        raise VolumeError(f"{path}: labels must be an object of names and numbers, got {labels}; correct it")
    # the Decathlon writes number -> name, nnU-Net name -> number
    if labels and all(str(key).isdecimal() for key in labels):
        labels = {name: int(number) for number, name in labels.items()}
    names = _label_names(path, labels) if labels else ()
    training = content.get("training")
    if training is None:
        cases = _nnunet_cases(path.parent, len(channels), content.get("file_ending", ".nii.gz"))
    else:
        cases = _datalist_cases(path, training)
    return Dataset(str(content.get("name", path.resolve().parent.name)), channels, names, cases)


def _label_names(path: Path, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    if "ignore" in numbers or any(isinstance(number, (list, tuple)) for number in numbers.values()):
        raise VolumeError(f"{path}: asks for regions or ignored voxels; only plain labels 0, 1, 2, ... are supported")
    names = {number: str(name) for name, number in numbers.items()}
    if len(names) < 2 or sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise VolumeError(
            f"{path}: labels must be numbered 0 (background), 1, 2, ... without gaps, got {dict(numbers)}"
        )
    return tuple(names[number] for number in range(len(names)))


def _nnunet_cases(folder: Path, num_channels: int, ending: str) -> tuple[Case, ...]:
    images, labels = folder / "imagesTr", folder / "labelsTr"
    for part in (images, labels):
        if not part.is_dir():
            raise VolumeError(f"{part}: no such folder; an nnU-Net raw folder holds imagesTr and labelsTr")
    first = f"_0000{ending}"
    names = [path.name.removesuffix(first) for path in images.iterdir() if path.name.endswith(first)]
    known = {f"{name}_{channel:04d}{ending}" for name in names for channel in range(num_channels)}
    picture = ending.lower() in PICTURE_SUFFIXES
    # what belongs to no case: a channel too many, or one without its first
    extra = sorted(path.name for path in images.iterdir() if path.name.endswith(ending) and path.name not in known)
    if extra:
        raise VolumeError(
            f"{images / extra[0]}: is not a channel _0000 to _{num_channels - 1:04d} of a case; "
            "channel_names in dataset.json must list every channel"
        )
    # one picture holds all its colours
    count = 1 if picture else num_channels
    return tuple(
        Case(
            name,
            tuple(images / f"{name}_{channel:04d}{ending}" for channel in range(count)),
            labels / f"{name}{ending}",
        )
        for name in names
    )


def _datalist_cases(path: Path, training: Any) -> tuple[Case, ...]:
    cases = []
    for entry in training if isinstance(training, list) else [training]:
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), (str, list)) or "label" not in entry:
            raise VolumeError(f"{path}: training must list objects with an image and a label, got {entry}; correct it")
        images = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
        label = path.parent / str(entry["label"])
        cases.append(Case(_stem(label), tuple(path.parent / str(image) for image in images), label))
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise VolumeError(f"{path}: lists case {twice[0]} twice; give every label map its own file name")
    return tuple(cases)


def _pairs(folder: Path, label_suffix: str) -> tuple[Case, ...]:
    for images, labels in _FOLDER_NAMES:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            break
    else:
        raise VolumeError(f"{folder}: holds neither dataset.json nor the folders images and labels; give a dataset")
    known = {_stem(path): path for path in (folder / labels).iterdir() if _is_readable(path)}
    cases = []
    for path in (folder / images).iterdir():
        if _is_readable(path):
            name = _stem(path)
            default = folder / labels / f"{name}{label_suffix}{path.name[len(name) :]}"
            cases.append(Case(name, (path,), known.get(name + label_suffix, default)))
    return tuple(cases)


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith((*SUFFIXES, *PICTURE_SUFFIXES)) and not path.name.startswith(".")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name
