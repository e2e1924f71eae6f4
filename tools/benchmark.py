"""Measure ops and models against their peers, in one run on one machine, and write tables and plots.

Competitors take turns, figures are medians with the fastest and slowest run, ratios are to the first competitor.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import benchmark_models
import benchmark_networks
import benchmark_ops
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import Times, environment, table

from vssm.cli.common import positive
from vssm.volumes.writing import atomic_file

EXAMPLE = """examples:
  python tools/benchmark.py ops --threads 2 --output model_zoo/benchmarks/cpu
  python tools/benchmark.py models --threads 1 --batch 4 --resolution 224 --output model_zoo/benchmarks/cpu
  python tools/benchmark.py models vmamba_tiny swin_tiny_patch4_window7_224 --resolution 224 512 1024
  python tools/benchmark.py networks --size 128 --channels 4 --output model_zoo/benchmarks/networks"""
WRONG_INPUT = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def sizes(text: str) -> tuple[int, ...]:
    """B,D,L,N from the command line."""
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not batch,channels,length,states, e.g. 1,384,3136,16")
    return numbers


def run_ops(options: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows, for the selective scan."""
    names = benchmark_ops.implementations(device, options.reference)
    dtypes = [DTYPES[name] for name in options.dtype]
    report = {
        "selective_scan": benchmark_ops.speed(device, dtypes, names, options.shape or benchmark_ops.SCAN_SHAPES),
        "fused scan along routes": benchmark_ops.routes(device, benchmark_ops.ROUTE_SHAPES),
        "time against length": benchmark_ops.growth(device, names[0]),
        "memory beyond the inputs, forward + backward": benchmark_ops.memory(
            device, [name for name in names if name != "reference"], options.threads, benchmark_ops.LONG_SHAPE
        ),
    }
    if names[0] == "native":
        report["one state against a copy"] = benchmark_ops.streaming(device, (4, 384, 3136, 1))
        if device.type == "cpu":
            report["threads"] = benchmark_ops.threads_gain(device, (4, 384, 3136, 16))
    return report


def run_models(options: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows, for whole models."""
    names = options.names or ["vmamba_tiny", *benchmark_models.PEERS]
    unknown = [name for name in names if not timm.is_model(name)]
    if unknown:
        raise ValueError(f"no model is called {unknown[0]!r}; see vssm list and timm.list_models()")
    report = {"models": benchmark_models.speed(names, options.resolution, options.batch, device)}
    memory = benchmark_models.memory(names, options.resolution[0], options.batch, device, options.threads)
    return report | {"memory of a training step beyond weights and pictures": memory}


def run_networks(options: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows, for 3-D networks."""
    speed = benchmark_networks.speed(options.channels, options.size, device)
    memory = benchmark_networks.memory(options.channels, options.size, device, options.threads)
    return {"networks": speed, "memory of inference beyond weights and volume": memory}


RUNS = {"ops": run_ops, "models": run_models, "networks": run_networks}


def draw(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Time against length, or throughput against resolution, one line for each pass and model."""
    x = "L" if "L" in rows[0] else "resolution"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        time = next(value for value in row.values() if isinstance(value, Times)).median
        label = f"{row.get('model', '')} {row['pass']}".strip()
        lines.setdefault(label, []).append((row[x], time if x == "L" else row["batch"] * 1e3 / time))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel="ms" if x == "L" else "pictures per second", title=title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=100)


def write(report: dict[str, list[dict[str, Any]]], where: dict[str, Any], command: str, path: Path) -> None:
    """PATH.json with every run, PATH.md with the tables, PATH-*.png where something is worth a plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        title: [{k: list(v.runs) if isinstance(v, Times) else v for k, v in row.items()} for row in rows]
        for title, rows in report.items()
    }
    with atomic_file(path.with_suffix(".json")) as stream:
        stream.write(json.dumps({"command": command, "environment": where, "results": plain}, indent=1).encode())
    with atomic_file(path.with_suffix(".md")) as stream:
        stream.write(text_of(report, where, command).encode())
    for title, rows in report.items():
        if "L" in rows[0] or len({row.get("resolution") for row in rows}) > 1:
            draw(title, rows, path.with_name(f"{path.name}-{title.replace(' ', '-')}.png"))


def text_of(report: dict[str, list[dict[str, Any]]], where: dict[str, Any], command: str) -> str:
    """The tables as Markdown, below what was run on which machine."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    head = f"`{command}`\n\n{where['date']}, {where['device']}, {where['threads']} threads, "
    head += f"native kernels: {where['native kernels']}, {versions}. Times: median (fastest..slowest) in ms."
    return "\n\n".join([head, *(f"## {title}\n\n{table(rows)}" for title, rows in report.items() if rows)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = Parser(
        prog="benchmark.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    ops = subjects.add_parser("ops", help="the selective scan: implementations, lengths, memory, threads")
    ops.add_argument("--shape", type=sizes, action="append", help="B,D,L,N to time; repeatable")
    ops.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    ops.add_argument("--reference", action="store_true", help="also time the sequential definition, which is slow")
    models = subjects.add_parser("models", help="models of vssm beside timm's")
    models.add_argument("names", nargs="*", help="models to compare, the first is the measure of the others")
    models.add_argument("--resolution", type=positive, nargs="+", default=[224])
    models.add_argument("--batch", type=positive, default=4)
    networks = subjects.add_parser("networks", help="3-D networks of vssm beside MONAI's SwinUNETR (needs einops)")
    networks.add_argument("--size", type=positive, default=128, help="voxels of a side of the volume")
    networks.add_argument("--channels", type=positive, default=4, help="of the volume")
    for subject in (ops, models, networks):
        subject.add_argument(
            "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
        )
        subject.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
        subject.add_argument("--output", type=Path, metavar="PATH", help="also write PATH.json, PATH.md and plots")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none that PyTorch can use; leave it out")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    command = " ".join(["python tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
    where = environment(device, options.threads)
    try:
        report = RUNS[options.subject](options, device)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return WRONG_INPUT
    print(text_of(report, where, command), end="")
    if options.output:
        write(report, where, command, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
