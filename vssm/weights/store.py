"""The folder where weights are kept, and its lock file: the hash of every file when it was first used.

The folder is torch's (and timm's) cache of downloads. A file whose hash is no longer the one in the lock file, or the
one its authors publish, is never used.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock

from ..atomic import replaced_file
from ..hashing import file_sha256
from ..zoo import Weights
from .download import DownloadError, download

LOCK_NAME = "vssm-zoo.lock.json"
_BY_HAND = "by hand"


class WeightsError(RuntimeError):
    """Weights cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Kept:
    """A file in the folder, as the lock file knows it.

    Attributes:
        path: of the file.
        weights: name of the row in the zoo that it was fetched or added for, or "".
        source: its address, or "by hand".
        sha256: in hexadecimal.
        bytes: its size.
        first_use: date on which the hash was recorded, "2026-11-26".
    """

    path: Path
    weights: str
    source: str
    sha256: str
    bytes: int
    first_use: str


def store_folder() -> Path:
    """Where weights are kept unless told otherwise: `checkpoints` in torch.hub's folder (TORCH_HOME moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(url: str, folder: Path | None = None, name: str = "", sha256: str = "") -> Kept:
    """The file behind an address, from the folder if it is there, else downloaded.

    Args:
        folder: `store_folder()` if None.
        name: of the weights in the zoo, or "".
        sha256: that the authors publish, or "".

    Raises:
        WeightsError: it cannot be downloaded (the message says what a person can do), it has not the published hash or
            not that of its first use, or a file of that name is there from another address.
        OSError: the folder cannot be written to.
    """
    folder = folder or store_folder()
    path = folder / PurePosixPath(unquote(urlsplit(url).path)).name
    with _locked(folder) as entries:
        known = entries.get(path.name, {}).get("source", url)
        if known not in (url, _BY_HAND):
            raise WeightsError(f"{path} came from {known}, not from {url}; choose another folder for this one")
        if not path.exists():
            try:
                download(url, path, lambda whole: _check(whole, path.name, entries, sha256))
            except DownloadError as error:
                raise WeightsError(
                    f"they could not be downloaded from {url} ({error}). Download that file by hand, e.g. "
                    f"on another machine, save it as {path} and try again"
                ) from error
        return _record(path, entries, name, url, sha256)


def get(facts: Weights, folder: Path | None = None) -> Kept:
    """The file of published weights: added by hand before, in the folder, or downloaded.

    Raises:
        WeightsError: as `fetch`; where there is no download, the message lists the steps that a person can take.
        OSError: the folder cannot be written to.
    """
    folder = folder or store_folder()
    if facts.url:
        return fetch(facts.url, folder, facts.name, facts.sha256)
    with _locked(folder) as entries:
        for file, entry in entries.items():
            if entry["weights"] == facts.name and (folder / file).exists():
                return _record(folder / file, entries, facts.name, _BY_HAND, facts.sha256)
    raise WeightsError(f"their authors offer no direct download. {by_hand(facts)}")


def add(facts: Weights, source: Path, folder: Path | None = None) -> Kept:
    """Copy a file that was downloaded by hand into the folder, where `get` and create_model find it.

    Raises:
        WeightsError: it has another hash than the published one, or than the file of these weights before.
        OSError: it cannot be read, or the folder cannot be written to.
    """
    folder = folder or store_folder()
    path = folder / (facts.file_name or f"{facts.name}{source.suffix}")
    with _locked(folder) as entries:
        _check(source, path.name, entries, facts.sha256)
        if not (path.exists() and path.samefile(source)):
            with source.open("rb") as stream, replaced_file(path) as copy:
                shutil.copyfileobj(stream, copy)
        return _record(path, entries, facts.name, facts.url or _BY_HAND, facts.sha256)


def kept_files(folder: Path | None = None) -> dict[str, Path]:
    """What the lock file knows and is there: by name of the file, and of the row it was added for.

    Raises:
        WeightsError: the lock file is damaged.
    """
    folder = folder or store_folder()
    found = {}
    for file, entry in _read(folder / LOCK_NAME).items():
        if (folder / file).exists():
            found |= {name: folder / file for name in (file, entry["weights"]) if name}
    return found


def by_hand(facts: Weights) -> str:
    """What a person does where there is only a page."""
    file = facts.file_name or "the checkpoint"
    if "drive.google.com/file/" in facts.page:
        step = "choose Download and confirm what Google Drive asks about large files"
    elif "drive.google.com/" in facts.page:
        step = f"download {file} from that Google Drive folder"
    elif "/releases/" in facts.page:
        step = f"download {facts.file_name or 'the asset of this model'} under Assets"
    else:
        step = f"download {file}"
    note = f" ({facts.note})" if facts.note and not facts.file_name else ""
    return f"Open {facts.page} in a browser, {step}{note}, then run: vssm zoo add {facts.name} FILE"


@contextmanager
def _locked(folder: Path) -> Iterator[dict[str, dict]]:
    """The entries of the lock file by file name, alone among processes; changes to them are written at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    with FileLock(folder / f".{LOCK_NAME}.mutex"):
        entries = _read(path)
        before = json.dumps(entries)
        yield entries
        if json.dumps(entries) != before:
            with replaced_file(path) as stream:
                stream.write((json.dumps({"files": entries}, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        for entry in entries.values():
            # a wrong or missing field is a TypeError
            Kept(path=path, **entry)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged ({error}); restore it, or remove it to record the hashes anew") from None
    return entries


def _check(path: Path, name: str, entries: dict[str, dict], published: str) -> str:
    """The hash of a file that is or will be called `name`; WeightsError if it is not what it must be."""
    found = file_sha256(path)
    if published and found != published:
        raise WeightsError(
            f"{name} has the SHA-256 {found}, its authors publish {published}; it was not used: fetch it anew"
        )
    first = entries.get(name, {}).get("sha256", found)
    if found != first:
        raise WeightsError(
            f"{name} has the SHA-256 {found}, but had {first} when it was first used; it was not used. If its authors "
            f"replaced it and you trust the new one, remove its entry from {LOCK_NAME}"
        )
    return found


def _record(path: Path, entries: dict[str, dict], name: str, source: str, published: str) -> Kept:
    found = _check(path, path.name, entries, published)
    new = Kept(path, name, source, found, os.path.getsize(path), date.today().isoformat())
    entry = entries.setdefault(path.name, {key: value for key, value in asdict(new).items() if key != "path"})
    # a download by its address alone knows no name
    entry["weights"] = entry["weights"] or name
    return Kept(path=path, **entry)
