"""The machine: what a figure was measured on, and what memory is left."""

import os
import platform
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def device_name(device: torch.device) -> str:
    """Kind and model of a device: "cuda: NVIDIA H100", "cpu: AMD EPYC"."""
    return f"{device.type}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()


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
