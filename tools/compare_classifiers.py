"""Train every family, shrunk to about 0.34 million parameters, and three of timm's own, equally long on the digits.

The recipe is configs/imagenet/digits.yaml: same pictures, order, augmentation, optimizer and number of epochs for all;
nothing is tuned to a model. Each trains in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import environment, table
from tqdm import tqdm

from vssm.atomic import replaced_file
from vssm.classification.fitting import train
from vssm.classification.options import ClassifierOptions
from vssm.cli.common import Parser, positive
from vssm.cli.training import run_training
from vssm.training.options import read_options

EXAMPLE = """examples:
  python tools/compare_classifiers.py --output model_zoo/benchmarks/digits-cpu
  python tools/compare_classifiers.py --models vmamba swin --seeds 1 --set epochs=3"""
PROG = "compare_classifiers.py"
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "imagenet" / "digits.yaml"
_THREE = {"depths": [1, 1, 2], "dims": [32, 64, 96]}
# Vim and LBVim keep one resolution: patches as large as the others' first stage has
_PLAIN = {"embed_dim": 96, "img_size": 32, "patch_size": 4}

# What is trained: a name of timm, and arguments that shrink it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vmamba": ("vmamba_tiny", _THREE),
    "vmambav0": ("vmambav0_tiny", _THREE),
    "msvmamba": ("msvmamba_tiny", _THREE),
    "msvmambav3": ("msvmambav3_tiny", _THREE),
    "vssd": ("vssd_tiny", {"depths": [1, 1, 2], "dims": [32, 48, 80], "num_heads": [2, 3, 5]}),
    "groupmamba": (
        "groupmamba_tiny",
        {"depths": [1, 1, 2], "dims": [28, 56, 84], "stem_dim": 16, "mlp_ratios": [4.0, 4.0, 4.0]},
    ),
    "efficientvmamba": ("efficientvmamba_tiny", _THREE),
    "hrvmamba": (
        "hrvmamba_nano",
        {
            "dims": [32, 48, 64],
            "units": [1, 1],
            "depths": [1, 1],
            "stem_dim": 16,
            "bottleneck_dim": 16,
            "neck_dims": [32, 48, 64],
            "num_features": 160,
        },
    ),
    "vcmamba": ("vcmamba_small", {**_THREE, "mambas": 1}),
    "vim": ("vim_tiny", {**_PLAIN, "depth": 4}),
    "lbvim": ("lbvim_tiny", {**_PLAIN, "depth": 5}),
    "convnext (timm)": ("convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [28, 56, 84, 112]}),
    "swin (timm)": (
        "swin_tiny_patch4_window7_224",
        {"depths": [1, 1, 2], "embed_dim": 26, "num_heads": [1, 2, 4], "img_size": 32, "window_size": 4},
    ),
    "mambaout (timm)": ("mambaout_tiny", {"depths": [1, 1, 2, 1], "dims": [24, 48, 72, 96]}),
}


def measure(options: ClassifierOptions, threads: int, queue: Any) -> None:
    """Trains and puts (best top-1 in percent, processor seconds), or the error, into `queue`."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        try:
            top1 = train(options, Path(folder)).best_top1
        except (ValueError, ArithmeticError) as error:
            queue.put(error)
            return
        seconds = time.process_time() - begun
        queue.put((top1, seconds))


def row_of(label: str, options: ClassifierOptions, seeds: int, threads: int) -> dict[str, str]:
    """The row of a model, from `seeds` trainings.

    Raises:
        ValueError: it cannot be trained.
    """
    model, arguments = MODELS[label]
    context, found = multiprocessing.get_context("spawn"), []
    for seed in range(seeds):
        chosen = dataclasses.replace(options, model=model, model_arguments=arguments, seed=seed)
        queue = context.SimpleQueue()
        process = context.Process(target=measure, args=(chosen, threads, queue), daemon=True)
        process.start()
        process.join()
        if process.exitcode:
            raise ValueError(f"the process that trained {label} ended with status {process.exitcode}")
        result = queue.get()
        if isinstance(result, Exception):
            raise ValueError(f"{label}: {result}")
        found.append(result)
    top1 = [result[0] for result in found]
    network = timm.create_model(model, num_classes=10, **arguments)
    return {
        "model": label,
        "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "top-1 %": f"{statistics.mean(top1):.2f}",
        "least to most": f"{min(top1):.2f} to {max(top1):.2f}",
        "processor s": f"{statistics.mean(result[1] for result in found):.0f}",
    }


def text_of(rows: list[dict[str, str]], options: ClassifierOptions, where: dict[str, Any], command: str) -> str:
    """The table as Markdown, below what was run on which machine."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    task = (
        f"{options.epochs} epochs of {options.image_size} x {options.image_size} pictures, batch {options.batch_size}"
    )
    head = f"`{command}`\n\n{where['date']}, {where['device']}, {where['threads']} threads, {versions}. {task}; "
    return f"{head}top-1 is the best epoch's on the held-out 364 digits.\n\n{table(rows)}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = Parser(
        prog=PROG,
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change an option of the recipe"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings of each (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("digits"), metavar="PATH", help="PATH.json and PATH.md")
    given = parser.parse_args(arguments)
    command = " ".join([f"python tools/{PROG}", *(sys.argv[1:] if arguments is None else arguments)])

    def compare() -> int:
        where = environment(torch.device("cpu"), given.threads)
        options = dataclasses.replace(read_options(ClassifierOptions, CONFIG, given.set), cpu=True)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            row_of(label, options, given.seeds, given.threads)
            for label in tqdm(given.models, unit="model", disable=not sys.stderr.isatty())
        ]
        text = text_of(rows, options, where, command)
        report = {"command": command, "environment": where, "options": dataclasses.asdict(options), "rows": rows}
        for suffix, content in ((".json", json.dumps(report, indent=1) + "\n"), (".md", text)):
            with replaced_file(given.output.with_suffix(suffix)) as stream:
                stream.write(content.encode())
        print(text, end="")
        return 0

    return run_training(PROG, compare, "set a smaller batch_size")


if __name__ == "__main__":
    sys.exit(main())
