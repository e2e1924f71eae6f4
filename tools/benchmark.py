"""Times the selective scan: native kernels, portable PyTorch and the sequential definition, in one run.

Prints markdown tables: time per pass, growth with the length, memory beyond the inputs, and what the fused scan along
the four routes of a cross-scan saves over copying a map to four sequences.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import vssm.ops
from vssm.layers.routes import CrossRoutes
from vssm.ops import native

MODES = {"native": contextlib.nullcontext, "portable": vssm.ops.use_portable, "reference": vssm.ops.use_reference}
SPEED_SHAPES = [(1, 384, 3136, 16), (2, 384, 3136, 1), (1, 768, 784, 1)]
GROWTH_SHAPES = [(1, 384, 784, 16), (1, 64, 65536, 16)]
MEMORY_SHAPE = (1, 64, 262144, 16)
# Batch, side of the map, channels, states, rank of the step projection.
ROUTE_SHAPES = [
    (4, 56, 192, 1, 6),
    (4, 56, 192, 1, 12),
    (4, 28, 192, 1, 12),
    (4, 14, 384, 1, 24),
    (4, 14, 768, 1, 24),
    (4, 7, 768, 1, 48),
    (4, 28, 192, 16, 12),
    (4, 56, 192, 16, 6),
]


def shape(text: str) -> tuple[int, ...]:
    """batch,channels,length,states from the command line."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not batch,channels,length,states, e.g. 1,384,3136,16")
    return sizes


def make_inputs(sizes: tuple[int, ...], gradients: bool) -> dict[str, torch.Tensor]:
    batch, channels, length, states = sizes
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "u": (batch, channels, length),
        "delta": (batch, channels, length),
        "A": (channels, states),
        "B": (batch, states, length),
        "C": (batch, states, length),
        "D": (channels,),
        "delta_bias": (channels,),
    }
    inputs = {name: torch.randn(sizes, generator=rng) for name, sizes in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    return {name: x.requires_grad_(gradients) for name, x in inputs.items()}


def run_once(inputs: dict[str, torch.Tensor], grad_out: torch.Tensor | None) -> None:
    """One forward pass; with `grad_out` also the backward pass."""
    out = vssm.ops.selective_scan(**inputs, delta_softplus=True)
    if grad_out is not None:
        torch.autograd.grad(out, list(inputs.values()), grad_out)


def time_pass(mode: str, sizes: tuple[int, ...], backward: bool, runs: int) -> list[float]:
    """Milliseconds of each run, after one more to warm up."""
    inputs = make_inputs(sizes, backward)
    grad_out = torch.randn(sizes[:3]) if backward else None
    times = []
    with MODES[mode]():
        for _ in range(runs + 1):
            start = time.perf_counter()
            run_once(inputs, grad_out)
            times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):.4g} ({min(times):.4g}..{max(times):.4g})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed(shapes: list[tuple[int, ...]], modes: list[str], runs: int, slow_runs: int) -> str:
    rows = []
    for sizes in shapes:
        for backward in (False, True):
            times = {m: time_pass(m, sizes, backward, runs if m == "native" else slow_runs) for m in modes}
            medians = {m: statistics.median(t) for m, t in times.items()}
            row = [str(sizes), "forward + backward" if backward else "forward", *map(spread, times.values())]
            rows.append(row + [f"{medians[m] / medians[modes[0]]:.1f}" for m in modes[1:]])
    header = ["batch, channels, length, states", "pass", *(f"{m} ms" for m in modes)]
    return table(header + [f"{m} / {modes[0]}" for m in modes[1:]], rows)


def growth(shapes: list[tuple[int, ...]], runs: int) -> str:
    """Times at a length and at four times that length, taken in turns so that noise meets both."""
    rows = []
    for batch, channels, length, states in shapes:
        for backward in (False, True):
            short, long = [], []
            for _ in range(runs):
                short += time_pass("native", (batch, channels, length, states), backward, 3)
                long += time_pass("native", (batch, channels, 4 * length, states), backward, 3)
            ratio = statistics.median(long) / statistics.median(short)
            name = "forward + backward" if backward else "forward"
            rows.append([str((batch, channels, length, states)), name, spread(short), spread(long), f"{ratio:.2f}"])
    return table(["batch, channels, length, states", "pass", "native ms", "at four times the length", "ratio"], rows)


def scan_sequences(x, dt_b_c, dt_weight, A, D, delta_bias):
    """Copies the map (B, D, H, W) to four sequences, scans them as one and adds up; dt_b_c is (B, 4, R + 2N, L)."""
    routes, states = CrossRoutes(), A.shape[2]
    sequences = routes.scatter(x)
    dt, b, c = dt_b_c.split((dt_weight.shape[2], states, states), dim=2)
    parameters = D.flatten(), None, delta_bias.flatten(), True
    y = vssm.ops.selective_scan(
        sequences.flatten(1, 2), (dt_weight @ dt).flatten(1, 2), A.flatten(0, 1), b, c, *parameters
    )
    return routes.gather(y.view(sequences.shape), x.shape[2:])


def routes(shapes: list[tuple[int, ...]], runs: int) -> str:
    """Times of `scan_sequences` and of the fused scan on inputs of the same sizes, taken in turns."""
    rows = []
    for batch, side, channels, states, rank in shapes:
        rng = torch.Generator().manual_seed(0)

        def normal(*sizes, rng=rng):
            return torch.randn(*sizes, generator=rng).requires_grad_()

        order = CrossRoutes().table((side, side), torch.device("cpu"))
        A = (-torch.rand(4, channels, states, generator=rng) - 0.5).requires_grad_()
        parameters = normal(4, channels, rank), A, normal(4, channels), normal(4, channels)
        maps = normal(batch, channels, side, side), normal(batch, 4, rank + 2 * states, side * side)
        rows_of_maps = normal(batch, side * side, channels), normal(batch, side * side, 4, rank + 2 * states)

        def fused(x, dt_b_c, dt_weight, A, D, delta_bias, order=order):
            return vssm.ops.cross_selective_scan(x, dt_b_c, dt_weight, A, order, D, delta_bias)

        for backward in (False, True):
            times = {scan_sequences: [], fused: []}
            for _ in range(runs + 1):
                for function, inputs in ((scan_sequences, (*maps, *parameters)), (fused, (*rows_of_maps, *parameters))):
                    start = time.perf_counter()
                    with torch.set_grad_enabled(backward):
                        y = function(*inputs)
                        if backward:
                            torch.autograd.grad(y, inputs, torch.ones_like(y))
                    times[function].append((time.perf_counter() - start) * 1e3)
            copied, direct = (values[1:] for values in times.values())
            ratio = statistics.median(copied) / statistics.median(direct)
            name = "forward + backward" if backward else "forward"
            rows.append(
                [str((batch, side, channels, states, rank)), name, spread(copied), spread(direct), f"{ratio:.2f}"]
            )
    header = ["batch, side, channels, states, rank", "pass", "sequences ms", "routes ms", "sequences / routes"]
    return table(header, rows)


def resident(field: str) -> int:
    """A memory figure of this process from the kernel, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(mode: str, sizes: tuple[int, ...], threads: int) -> int:
    """Largest memory above the inputs, in bytes, while a forward and a backward pass run; for a process of its own."""
    torch.set_num_threads(threads)
    with MODES[mode]():
        run_once(make_inputs((1, 2, 16, 1), True), torch.ones(1, 2, 16))
        inputs, grad_out = make_inputs(sizes, True), torch.randn(sizes[:3])
        # Resets the high-water mark.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        run_once(inputs, grad_out)
    return resident("VmHWM") - before


def memory(sizes: tuple[int, ...], modes: list[str], threads: int) -> str:
    rows = []
    for mode in modes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_memory, (mode, sizes, threads))
        rows.append([str(sizes), mode, f"{peak / 1e9:.3f}"])
    return table(["batch, channels, length, states", "forward + backward", "GB above the inputs"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/benchmark.py --threads 2 --shape 1,384,3136,16 --output scan.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=shape, action="append", help="batch,channels,length,states to time; repeatable")
    parser.add_argument(
        "--growth-shape", type=shape, action="append", help="shape to time, also at four times the length"
    )
    parser.add_argument("--memory-shape", type=shape, default=MEMORY_SHAPE)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="ratios are to the first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=15, help="timed runs of the native kernels")
    parser.add_argument("--slow-runs", type=int, default=3, help="timed runs of the others")
    parser.add_argument("--output", type=Path, help="write the tables to this file as well")
    options = parser.parse_args()
    if "native" in options.modes and native.library is None:
        sys.exit(f"benchmark: no native kernels: {native.reason}")

    torch.set_num_threads(options.threads)
    level = native.library.vssm_simd_level().decode() if native.library else "none"
    environment = f"{platform.machine()}, instruction set {level}, {options.threads} threads, torch {torch.__version__}"
    report = [f"Median (min..max) on {environment}; float32, D, delta_bias and softplus given."]
    if Path("/proc/self/clear_refs").exists():
        fast = [mode for mode in options.modes if mode != "reference"]
        report.append(memory(options.memory_shape, fast, options.threads))
    report.append(speed(options.shape or SPEED_SHAPES, options.modes, options.runs, options.slow_runs))
    if "native" in options.modes:
        report.append(growth(options.growth_shape or GROWTH_SHAPES, 3))
        report.append(routes(ROUTE_SHAPES, options.runs))
    text = "\n\n".join(report) + "\n"
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
