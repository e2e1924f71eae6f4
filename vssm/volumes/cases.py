"""Which files of a folder are one case, by nnU-Net's naming: CASE_0000.nii.gz, CASE_0001.nii.gz are its channels."""

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import VolumeError
from .reading import SUFFIXES

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Case:
    """One subject: its name and its images, one per input channel of the network, in their order."""

    name: str
    images: tuple[Path, ...]


def find_cases(folder: str | Path, channels: int) -> list[Case]:
    """The cases of a folder, sorted by name. Sub-folders, hidden files and other kinds of files are left out.

    A file whose name ends in _0000 begins a case whose further channels end in _0001, _0002 and so on. Where the
    network takes one channel, files without such an ending are cases of their own.

    Args:
        folder: to look in.
        channels: how many images each case must have.

    Raises:
        VolumeError: the folder cannot be read or holds no volumes, a case lacks a channel or has too many, or two files
            are the same case.
    """
    folder = Path(folder)
    try:
        files = sorted(path for path in folder.iterdir() if _is_volume(path))
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be read ({error.strerror or error}); check its permissions") from None
    if not files:
        raise VolumeError(f"{folder}: holds no .nii or .nii.gz file; give the folder that holds the volumes")
    matches = {path: _CHANNEL.fullmatch(case_name(path)) for path in files}
    begun = {match["case"] for match in matches.values() if match and int(match["channel"]) == 0}
    found: dict[str, dict[int, Path]] = {}
    for path, match in matches.items():
        split = match is not None and (channels > 1 or match["case"] in begun)
        name, channel = (match["case"], int(match["channel"])) if split else (case_name(path), 0)
        other = found.setdefault(name, {}).setdefault(channel, path)
        if other is not path:
            raise VolumeError(f"{path}: is the same case as {other.name}; move one of them elsewhere")
    for name, images in found.items():
        if sorted(images) != list(range(channels)):
            expected = ", ".join(f"{name}_{channel:04d}" for channel in range(channels))
            got = ", ".join(images[channel].name for channel in sorted(images))
            raise VolumeError(
                f"{folder}: case {name} must have {channels} channel{'s' if channels > 1 else ''} ({expected}), got "
                f"{got}; add what is missing or rename the files"
            )
    return [Case(name, tuple(images[channel] for channel in range(channels))) for name, images in sorted(found.items())]


def case_name(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _is_volume(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(SUFFIXES)
