"""Benchmarks of ops: implementations against one another and, where importable, against mamba_ssm.

Letters: B batch, D channels, L steps, N states.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from measuring import Times, peak_memory, take_turns

import vssm.ops
from vssm.layers.routes import CrossRoutes
from vssm.ops import backends

# What runs on the device by itself is called native here: the CPU library, or Triton.
IMPLEMENTATIONS = {
    "native": contextlib.nullcontext,
    "portable": vssm.ops.use_portable,
    "reference": vssm.ops.use_reference,
}
PASSES = ("forward", "forward + backward")
# (B, D, L, N): stages of VMamba-T (four routes as channels) and Vim-S, a U-Mamba bottleneck, a whole volume.
SCAN_SHAPES = ((1, 384, 3136, 16), (4, 384, 3136, 1), (8, 768, 197, 16), (1, 64, 65536, 16))
LONG_SHAPE = (1, 64, 262144, 16)
# B, side of the map, D, N, rank of dt: stages of VMamba's backbones, and two with the 16 states of the others.
ROUTE_SHAPES = (
    (4, 56, 192, 1, 6),
    (4, 28, 192, 1, 12),
    (4, 14, 384, 1, 24),
    (4, 7, 768, 1, 48),
    (4, 28, 192, 16, 12),
    (4, 56, 192, 16, 6),
)
LENGTHS = (256, 1024, 4096, 16384, 65536)


def scan_inputs(sizes: tuple[int, ...], dtype: torch.dtype, device: str, gradients: bool) -> dict[str, torch.Tensor]:
    """Arguments of selective_scan by name."""
    batch, channels, length, states = sizes
    rng = torch.Generator().manual_seed(0)
    sequence, rows = (batch, channels, length), (batch, states, length)
    shapes = {"u": sequence, "delta": sequence, "A": (channels, states), "B": rows, "C": rows}
    shapes |= {"D": (channels,), "delta_bias": (channels,)}
    inputs = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    for name in ("u", "delta", "B", "C"):
        inputs[name] = inputs[name].to(dtype)
    return {name: x.to(device).requires_grad_(gradients) for name, x in inputs.items()}


def scan_call(
    implementation: str, sizes: tuple[int, ...], dtype: torch.dtype, device: str, backward: bool
) -> Callable[[], Any]:
    """One pass of selective_scan as a call without arguments; the implementation is one of the above or mamba_ssm."""
    inputs = scan_inputs(sizes, dtype, device, backward)
    function, context = vssm.ops.selective_scan, contextlib.nullcontext
    if implementation == "mamba_ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as function
    else:
        context = IMPLEMENTATIONS[implementation]
    grad_out = torch.ones(sizes[:3], dtype=dtype, device=device)

    def call() -> None:
        with context():
            out = function(**inputs, delta_softplus=True)
            if backward:
                torch.autograd.grad(out, list(inputs.values()), grad_out)

    return call


def implementations(device: torch.device, with_reference: bool) -> list[str]:
    """What can run here, the one to compare with first."""
    served = {row.device: row.kernel for row in backends.status() if row.op == "selective_scan"}
    names = ["native"] if served.get(device.type) != "portable" else []
    names += ["portable", "reference"] if with_reference else ["portable"]
    if device.type == "cuda" and importlib.util.find_spec("mamba_ssm"):
        names.append("mamba_ssm")
    return names


def _row(sizes: tuple[int, ...], dtype: torch.dtype, what: str, times: dict[str, Times]) -> dict[str, Any]:
    first = next(iter(times))
    batch, channels, length, states = sizes
    elements = batch * channels * length * states
    row = {"B, D, L, N": ", ".join(map(str, sizes)), "dtype": str(dtype).removeprefix("torch."), "pass": what}
    row |= {f"{name} ms": time for name, time in times.items()}
    row |= {f"{name} / {first}": f"{time.median / times[first].median:.2f}" for name, time in list(times.items())[1:]}
    return row | {f"{first} ns per element": f"{times[first].median * 1e6 / elements:.3g}"}


def speed(device: torch.device, dtypes: list[torch.dtype], names: list[str], shapes: Any) -> list[dict[str, Any]]:
    """Rows of times per shape, dtype and pass."""
    rows = []
    for sizes in shapes:
        for dtype in dtypes:
            for what in PASSES:
                calls = {n: scan_call(n, sizes, dtype, device.type, what != "forward") for n in names}
                rows.append(_row(sizes, dtype, what, take_turns(calls, device)))
    return rows


def scan_sequences(x, dt_b_c, dt_weight, A, D, delta_bias):
    """Copies the map (B, D, H, W) to four sequences, scans them as one and adds up; dt_b_c is (B, 4, R + 2N, L)."""
    walk, states = CrossRoutes(), A.shape[2]
    sequences = walk.scatter(x)
    dt, b, c = dt_b_c.split((dt_weight.shape[2], states, states), dim=2)
    delta = (dt_weight @ dt).flatten(1, 2)
    parameters = D.flatten(), None, delta_bias.flatten(), True
    y = vssm.ops.selective_scan(sequences.flatten(1, 2), delta, A.flatten(0, 1), b, c, *parameters)
    return walk.gather(y.view(sequences.shape), x.shape[2:])


def routes(device: torch.device, shapes: Any) -> list[dict[str, Any]]:
    """Rows of the fused scan along the cross-scan's four routes against four sequences made, scanned and added up."""
    rows = []
    for batch, side, channels, states, rank in shapes:
        rng = torch.Generator().manual_seed(0)

        def normal(*sizes: int, rng: torch.Generator = rng) -> torch.Tensor:
            return torch.randn(*sizes, generator=rng).to(device).requires_grad_()

        order = CrossRoutes().table((side, side), device)
        A = (-torch.rand(4, channels, states, generator=rng) - 0.5).to(device).requires_grad_()
        parameters = normal(4, channels, rank), A, normal(4, channels), normal(4, channels)
        maps = normal(batch, channels, side, side), normal(batch, 4, rank + 2 * states, side * side), *parameters
        last = normal(batch, side * side, channels), normal(batch, side * side, 4, rank + 2 * states), *parameters

        def fused(*inputs: torch.Tensor, order: torch.Tensor = order) -> torch.Tensor:
            return vssm.ops.cross_selective_scan(*inputs[:4], order, *inputs[4:])

        for what in PASSES:

            def call(function: Callable, inputs: tuple, backward: bool = what != "forward") -> Callable[[], None]:
                def run() -> None:
                    with torch.set_grad_enabled(backward):
                        y = function(*inputs)
                        if backward:
                            torch.autograd.grad(y, inputs, torch.ones_like(y))

                return run

            times = take_turns({"routes": call(fused, last), "sequences": call(scan_sequences, maps)}, device)
            row = {"B, side, D, N, R": f"{batch}, {side}, {channels}, {states}, {rank}", "pass": what}
            row |= {f"{name} ms": time for name, time in times.items()}
            ratio = times["sequences"].median / times["routes"].median
            rows.append(row | {"sequences / routes": f"{ratio:.2f}"})
    return rows


def growth(device: torch.device, name: str, channels: int = 64, states: int = 16) -> list[dict[str, Any]]:
    """Rows of times at lengths that grow fourfold, with the ratio to the length before."""
    rows = []
    for what in PASSES:
        sizes = {length: (1, channels, length, states) for length in LENGTHS}
        calls = {str(n): scan_call(name, s, torch.float32, device.type, what != "forward") for n, s in sizes.items()}
        times = take_turns(calls, device)
        before = None
        for length in LENGTHS:
            now = times[str(length)]
            ratio = f"{now.median / before.median:.2f}" if before else ""
            rows.append({"L": length, "pass": what, f"{name} ms": now, "to a quarter of the length": ratio})
            before = now
    return rows


def memory(device: torch.device, names: list[str], threads: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of the memory that a forward and a backward pass need beyond the inputs."""
    rows = []
    for name in names:
        peak = peak_memory(scan_call, (name, sizes, torch.float32, device.type, True), threads)
        if peak is not None:
            rows.append({"B, D, L, N": ", ".join(map(str, sizes)), "implementation": name, "GB": f"{peak / 1e9:.3f}"})
    return rows


def threads_gain(device: torch.device, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of the native times on one and on two threads of the CPU."""
    rows = []
    before = torch.get_num_threads()
    try:
        for what in PASSES:
            plain = scan_call("native", sizes, torch.float32, "cpu", what != "forward")

            def on(threads: int, plain: Callable[[], Any] = plain) -> Callable[[], None]:
                def call() -> None:
                    torch.set_num_threads(threads)
                    plain()

                return call

            times = take_turns({"1": on(1), "2": on(2)}, device)
            gain = times["1"].median / times["2"].median
            row = {"B, D, L, N": ", ".join(map(str, sizes)), "pass": what, "1 thread ms": times["1"]}
            rows.append(row | {"2 threads ms": times["2"], "gain": f"{gain:.2f}"})
    finally:
        torch.set_num_threads(before)
    return rows


def streaming(device: torch.device, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The forward pass with one state against copying as many bytes as it must move."""
    inputs = scan_inputs(sizes, torch.float32, device.type, False)
    moved = sum(inputs[name].nbytes for name in ("u", "delta", "B", "C")) + inputs["u"].nbytes
    # A copy reads and writes: half of the bytes in, half out.
    source = torch.ones(moved // 8, device=device)
    target = torch.empty_like(source)
    scan = scan_call("native", sizes, torch.float32, device.type, False)
    times = take_turns({"scan": scan, "copy": lambda: target.copy_(source)}, device)
    ratio = times["scan"].median / times["copy"].median
    row = {"B, D, L, N": ", ".join(map(str, sizes)), "MB moved": f"{moved / 1e6:.0f}", "scan ms": times["scan"]}
    return [row | {"copy of as many bytes ms": times["copy"], "ratio": f"{ratio:.2f}"}]
