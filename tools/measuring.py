"""Time and memory of a call, measured so that competitors share the machine's noise: they take turns in one process."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import vssm
from vssm.machine import device_name
from vssm.ops import native


@dataclass(frozen=True)
class Times:
    """Milliseconds of each run."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({min(self.runs):.4g}..{max(self.runs):.4g})"


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    seconds: float = 2.0,
    least: int = 3,
    most: int = 50,
) -> dict[str, Times]:
    """Milliseconds of every call.

    After one call each to warm up, all calls run one after the other, again and again, so that a disturbance meets them
    alike. A call is timed until it has taken `seconds` in total, at least `least` and at most `most` times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        synchronize(device)
    waiting = dict(calls)
    while waiting:
        for name, call in list(waiting.items()):
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e3)
            count, total = len(times[name]), sum(times[name])
            if count >= most or (count >= least and total >= seconds * 1e3):
                del waiting[name]
    return {name: Times(tuple(runs)) for name, runs in times.items()}


def resident(field: str) -> int:
    """A memory figure of this process from the kernel (VmRSS, VmHWM), in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak(make: Callable[..., Callable[[], Any]], arguments: tuple, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    call = make(*arguments)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        queue.put(torch.cuda.max_memory_allocated() - before)
        return
    # Resets the high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    queue.put(resident("VmHWM") - before)


def peak_memory(make: Callable[..., Callable[[], Any]], arguments: tuple, threads: int) -> int | None:
    """Bytes that the call made by `make(*arguments)` needs above what it was made with, in a process of its own.

    `make` and its arguments must be picklable. None where the system does not tell (a CPU without Linux).
    """
    if not torch.cuda.is_available() and not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_peak, args=(make, arguments, threads, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that measured memory ended with status {process.exitcode}")
    return queue.get()


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """What a figure depends on: date, processor or GPU, threads, versions."""
    level = native.library.vssm_simd_level().decode() if native.library else f"none ({native.reason})"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "threads": threads,
        "native kernels": level,
        "versions": {module.__name__: module.__version__ for module in (vssm, torch, timm)},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of rows that all have the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
