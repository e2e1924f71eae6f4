"""Memory that is left to this process, so that a volume too large is refused before anything is allocated."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import VolumeError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# what devices without an exception of their own say
_NO_MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator")


def available_memory() -> int | None:
    """Bytes that can still be allocated, or None where the system does not tell.

    Linux: the smaller of MemAvailable and what the control group (version 2) leaves. Other POSIX systems: all
    physical memory.
    """
    if _MEMINFO.exists():
        return min([_numbers(_MEMINFO)["MemAvailable:"] * 1024, *_cgroup_left()])
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_left() -> tuple[int, ...]:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return ()
    # cached files count as used, but are given up on demand
    cached = _numbers(_CGROUP / "memory.stat")["inactive_file"]
    return (max(0, int(limit.read_text()) - int(used.read_text()) + cached),)


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a system file."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {word[0]: int(word[1]) for word in words}


def fits_memory(needed: int) -> bool:
    """Whether `needed` bytes are available, as far as the system tells."""
    available = available_memory()
    return available is None or needed <= available


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Check that `needed` bytes are available.

    Raises:
        VolumeError: if they are not; the message reads "{what} needs about x GB of memory and ...; {remedy}".
    """
    available = available_memory()
    if available is not None and needed > available:
        raise VolumeError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available; {remedy}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of Python, NumPy or torch says that memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _NO_MEMORY_WORDS
    )


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """For work whose need was estimated too low: exhausted memory is a VolumeError about `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise VolumeError(f"{what} does not fit into memory; crop the volume or use a larger machine") from None
