"""Checkpoints of a running training: written whole or not at all, read without running code, random states included."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from ..atomic import replaced_file


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` holds the old or the new one at every moment, a power cut included.

    Args:
        state: nested dictionaries and lists of tensors, numbers, texts and None.

    Raises:
        OSError: the system refuses (no space, no permission).
    """
    with replaced_file(path) as stream:
        torch.save(state, stream)
    # the new name is on disk only once the folder is
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; start the run without --resume or give the folder of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: is damaged ({cause}); restore it or start the run anew") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no checkpoint of a run; give the folder of a run")
    return state


def checkpoint_to_resume(
    path: Path, resume: bool, begun: Path, options: Any, free: Collection[str], needed: Collection[str]
) -> dict[str, Any] | None:
    """The checkpoint that a run continues from, or None if it starts.

    Args:
        path: of the checkpoint, in the folder of the run.
        resume: whether the user asks to continue; where a run was killed before its first checkpoint it starts anew.
        begun: file that a run writes before its first checkpoint.
        options: dataclass; the checkpoint's "options" must equal it but for the names in `free`.
        needed: keys that the checkpoint must have besides "options".

    Raises:
        ValueError: there is a run and none is to be resumed, there is none and one is, or it had other options.
    """
    folder = path.parent
    if not resume:
        if path.exists():
            raise ValueError(f"{folder} holds a run; continue it with --resume, or choose another folder")
        return None
    if not path.exists():
        if not begun.exists():
            raise ValueError(f"{folder} holds no run to resume; start it without --resume")
        return None
    checkpoint = load_checkpoint(path)
    missing = {*needed, "options"} - checkpoint.keys()
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; it is no checkpoint of this tool")
    then, now = checkpoint["options"], dataclasses.asdict(options)
    changed = [key for key in now if key not in free and now[key] != then.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{folder} was started with {key}={then.get(key)!r}, now it is {now[key]!r}; resume with the same options, "
            "or start another run"
        )
    return checkpoint


def state_of_process(states: list[dict[str, Any]], folder: Path, process: int, processes: int) -> dict[str, Any]:
    """The random state of this process among those of a checkpoint.

    Raises:
        ValueError: the run had another number of processes.
    """
    if len(states) != processes:
        raise ValueError(
            f"{folder} was trained by {len(states)} processes, now there are {processes}; resume with as many"
        )
    return states[process]


def random_state() -> dict[str, Any]:
    """The states of all generators that networks and transforms may draw from: Python, NumPy, torch, CUDA."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue where `random_state` looked."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
