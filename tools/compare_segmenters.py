"""Train U-Mamba, the same network without Mamba, DynUNet and SwinUNETR equally long, measure all on held-out tissue.

The task is that of demo_brain.py: grey and white matter, learned from degraded scans of the left half of the ICBM 2009a
T1 template, measured on a degraded scan of the right half. Every network sees the same patches in the same order for
the same number of steps, from random weights, with the same optimizer. Memory is the highest of a training process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_brain import CONFIG, Demonstration, Options, Parser, count, mean, write_scan
from measuring import environment, resident, table
from monai.networks.nets import DynUNet, SwinUNETR
from torch import nn

from vssm.training.options import read_options
from vssm.volumes import load_bundle, predict_volume, read_volume
from vssm.volumes.phantom import LABELS
from vssm.volumes.training import TrainingError
from vssm.volumes.writing import atomic_file

EXAMPLE = """examples:
  python tools/compare_segmenters.py --output model_zoo/benchmarks/segmenters-cpu
  python tools/compare_segmenters.py --networks U-Mamba DynUNet --set steps=100"""
WRONG_INPUT = 2
# SwinUNETR takes multiples of 32 voxels, and its norms more than one voxel at a 32nd of the resolution.
TASK = ("patch_size=[32, 64, 32]",)

# Name -> constructor. DynUNet has the widths and strides of the bundle's U-Mamba, SwinUNETR its smallest width.
NETWORKS: dict[str, Callable[[Demonstration], nn.Module]] = {
    "U-Mamba": lambda task: task.bundle_network(),
    "U-Mamba without Mamba": lambda task: task.bundle_network(mixer="none"),
    "DynUNet": lambda task: _dynunet(**task.definition["network_def"]),
    "SwinUNETR": lambda task: SwinUNETR(in_channels=1, out_channels=len(LABELS), feature_size=12),
}


def _dynunet(features: list[int], strides: list[int], kernel_sizes: list[int], **_: Any) -> nn.Module:
    return DynUNet(3, 1, len(LABELS), kernel_sizes, strides, upsample_kernel_size=strides[1:], filters=features)


def measure(name: str, options: Options, folder: Path, threads: int, queue: Any) -> None:
    """Trains one network and puts its row, or the error, into `queue`; runs in a process of its own."""
    torch.set_num_threads(threads)
    try:
        queue.put(_measure(name, options, folder))
    except (ValueError, TrainingError) as error:
        queue.put(error)


def _measure(name: str, options: Options, folder: Path) -> dict[str, Any]:
    task = Demonstration(options)
    scan = folder / "scan.nii.gz"
    write_scan(task, scan)
    volume = read_volume(scan)
    # Linux: resets the high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    wall, processor = time.perf_counter(), time.process_time()
    network = task.train(name, lambda: NETWORKS[name](task))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    memory = resident("VmHWM")
    bundle = load_bundle(task.bundle_folder)
    bundle = dataclasses.replace(bundle, network=network, window=bundle.window | {"roi_size": options.patch_size})
    labels = predict_volume(volume, bundle, device="cpu", progress=True)
    dice = task.score(torch.from_numpy(labels))
    return {
        "network": name,
        "parameters": f"{count(network):,}",
        "Dice grey": f"{dice['gm']:.3f}",
        "Dice white": f"{dice['wm']:.3f}",
        "mean": f"{mean(dice):.3f}",
        "training s": round(wall),
        "processor s": round(processor),
        "memory GB": f"{memory / 1e9:.2f}",
    }


def run(options: Options, names: list[str], folder: Path, threads: int) -> list[dict[str, Any]]:
    """The rows of the table, the networks one after the other.

    Raises:
        ValueError: an option does not fit the data.
        TrainingError: a loss was not finite.
        RuntimeError: a process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in names:
        queue = context.SimpleQueue()
        process = context.Process(target=measure, args=(name, options, folder, threads, queue), daemon=True)
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the process that trained {name} ended with status {process.exitcode}")
        row = queue.get()
        if isinstance(row, Exception):
            raise row
        rows.append(row)
    return rows


def text_of(rows: list[dict[str, Any]], options: Options, where: dict[str, Any], command: str) -> str:
    """The table as Markdown, below what was run on which machine."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    task = f"{options.steps} steps of {options.batch_size} patches of {options.patch_size} voxels, seed {options.seed}"
    head = f"`{command}`\n\n{where['date']}, {where['device']}, {where['threads']} threads, {versions}. {task}; "
    return f"{head}memory is the highest of the process that trained.\n\n{table(rows)}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = Parser(
        prog="compare_segmenters.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file of options (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an option")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--output", type=Path, default=Path("segmenters"), metavar="PATH", help="PATH.json and PATH.md")
    given = parser.parse_args(arguments)
    command = " ".join(["python tools/compare_segmenters.py", *(sys.argv[1:] if arguments is None else arguments)])
    where = environment(torch.device("cpu"), given.threads)
    try:
        options = read_options(Options, given.config, [*TASK, *given.set])
        given.output.parent.mkdir(parents=True, exist_ok=True)
        rows = run(options, given.networks, given.output.parent, given.threads)
    except (ValueError, OSError, TrainingError, RuntimeError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    report = {"command": command, "environment": where, "options": dataclasses.asdict(options), "rows": rows}
    with atomic_file(given.output.with_suffix(".json")) as stream:
        stream.write(json.dumps(report, indent=1).encode() + b"\n")
    text = text_of(rows, options, where, command)
    with atomic_file(given.output.with_suffix(".md")) as stream:
        stream.write(text.encode())
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
