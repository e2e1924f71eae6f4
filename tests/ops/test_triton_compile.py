"""Triton kernels compile for GPUs of both makers, as they are launched, on a machine that has none."""

from __future__ import annotations

import importlib.util
import inspect
import os

import pytest
import torch
from conftest import require

if importlib.util.find_spec("triton") is None:
    require("triton", "Triton is not installed; pip install triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vssm.ops.causal_conv1d import triton as conv
from vssm.ops.cross_selective_scan import triton as cross
from vssm.ops.local_bidirectional_scan import triton as local_scan
from vssm.ops.selective_scan import triton as scan
from vssm.ops.ssd import triton as ssd

TARGETS = {"H200": GPUTarget("cuda", 90, 32), "MI300": GPUTarget("hip", "gfx942", 64)}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process")


def compile_launch(kernel, target, args, kwargs):
    """Compiles `kernel` as a launch with these arguments does: knowing Nones, ones and multiples of 16."""
    names = list(inspect.signature(kernel.fn).parameters)
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
    values = dict(zip(names, args, strict=False)) | kwargs
    assert values.keys() == set(names)
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1 or "constexpr" in str(parameter.annotation):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
        if signature[name] not in ("constexpr", "fp32") and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function that compiles every kernel that `call(*args)` launches, and returns them by name."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(target, call, *args):
        kernels = {}

        def launch(kernel, *args, grid, warmup, **kwargs):
            kernels[kernel.fn.__name__] = compile_launch(kernel, TARGETS[target], args, kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(triton.JITFunction, "run", launch)
            result = call(*args)
        return kernels, result

    return compiled


def scan_inputs(batch, channels, length, states, groups, dtype, optional):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    sequence, weights = empty(batch, channels, length, dtype=dtype), empty(batch, groups, states, length, dtype=dtype)
    channel = empty(channels) if optional else None
    gate = sequence if optional else None
    return sequence, sequence, empty(channels, states), weights, weights, channel, gate, channel


@pytest.mark.parametrize(
    "target,shape,dtype,optional",
    [
        ("H200", (1, 64, 262_144, 16, 1), torch.bfloat16, True),
        ("H200", (128, 384, 3136, 1, 4), torch.float32, False),
        ("H200", (1, 3, 1, 64, 3), torch.float16, True),
        ("MI300", (1, 64, 262_144, 16, 1), torch.float32, True),
    ],
)
def test_the_scan_compiles(compiled, target, shape, dtype, optional):
    inputs = scan_inputs(*shape, dtype, optional)
    kernels, (out, last_state, chunk_states) = compiled(target, scan.forward, *inputs, True)
    kernels |= compiled(target, scan.backward, out, last_state, *inputs, chunk_states, True)[0]
    cut = {"segment_ends_kernel", "segment_messages_kernel", "carry_kernel"}
    assert kernels.keys() == {"scan_kernel", "backward_kernel"} | (cut if shape[2] > 100_000 else set())
    for name, kernel in kernels.items():
        # What a program of an MI300 may have; an H200 gives 227 KiB.
        assert kernel.metadata.shared <= 64 * 1024, name


@pytest.mark.parametrize(
    "target,shape,window,dtype,optional",
    [
        ("H200", (1, 64, 262_144, 16, 1), 16, torch.bfloat16, True),
        ("H200", (128, 384, 196, 16, 1), 8, torch.float32, False),
        ("H200", (3, 3, 4, 64, 1), 4, torch.float16, True),
        ("MI300", (1, 64, 1024, 16, 1), 16, torch.float32, True),
    ],
)
def test_the_local_scan_compiles(compiled, target, shape, window, dtype, optional):
    inputs = scan_inputs(*shape, dtype, optional)
    kernels, (out, chunk_states) = compiled(target, local_scan.forward, *inputs, True, window)
    kernels |= compiled(target, local_scan.backward, out, *inputs, chunk_states, True, window)[0]
    cut = {"segment_ends_kernel", "segment_messages_kernel", "carry_kernel"}
    assert kernels.keys() == {"scan_kernel", "backward_kernel"} | (cut if shape[2] > 1000 else set())
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 64 * 1024, name


@pytest.mark.parametrize(
    "target,shape,dtype,optional",
    [
        ("H200", (1, 64, 262_144, 4), torch.bfloat16, True),
        ("H200", (3, 1, 49, 1), torch.float32, False),
        ("MI300", (1, 64, 196, 4), torch.float16, True),
    ],
)
def test_the_convolution_compiles(compiled, target, shape, dtype, optional):
    *size, taps = shape
    x = torch.empty(size, dtype=dtype, device="meta")
    weight, bias = torch.empty(size[1], taps, device="meta"), torch.empty(size[1], device="meta") if optional else None
    kernels, out = compiled(target, conv.forward, x, weight, bias, optional)
    kernels |= compiled(target, conv.backward, out, x, weight, bias, optional)[0]
    assert kernels.keys() == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize(
    "target,shape,dtype,optional",  # batch, length, heads, channels of a head, groups, states
    [
        ("H200", (1, 262_144, 1, 64, 1, 16), torch.float32, True),
        ("H200", (128, 196, 12, 64, 1, 128), torch.bfloat16, True),
        ("H200", (2, 1, 3, 5, 3, 1), torch.float16, False),
        ("MI300", (1, 1024, 4, 64, 2, 64), torch.bfloat16, True),
    ],
)
def test_mamba_2_compiles(compiled, monkeypatch, target, shape, dtype, optional):
    if target == "MI300":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    batch, length, heads, width, groups, states = shape

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weights = empty(*shape[:4], dtype=dtype), empty(batch, length, groups, states, dtype=dtype)
    dt, head = empty(*shape[:3], dtype=dtype), empty(heads)
    inputs = [x, dt, head, weights, weights, *[None] * 4]
    if optional:
        inputs[5:] = [head, x, head, empty(batch, heads, width, states)]
    settings = True, 0.0, float("inf"), 64
    kernels, (out, final_states) = compiled(target, ssd.forward, *inputs, *settings)
    kernels |= compiled(target, ssd.backward, out, final_states, *inputs, *settings)[0]
    names = ("chunk_ends", "carry", "output", "input_gradients", "group_gradients")
    assert kernels.keys() == {f"{name}_kernel" for name in names}
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 64 * 1024, name


@pytest.mark.parametrize(
    "target,shape,own,dtype,optional",  # batch, positions, channels, routes, steps, states, rank
    [
        ("H200", (128, 3136, 96, 4, 3136, 1, 6), False, torch.float32, True),
        ("H200", (1, 262_144, 48, 3, 262_144, 16, 3), True, torch.bfloat16, True),
        ("H200", (1, 1, 1, 1, 1, 1, 1), False, torch.float16, False),
        ("MI300", (1, 3136, 40, 4, 3140, 1, 6), False, torch.float32, True),
    ],
)
def test_the_scan_along_routes_compiles(compiled, target, shape, own, dtype, optional):
    batch, positions, channels, routes, steps, states, rank = shape

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(batch, positions, *[routes] * own, channels, dtype=dtype)
    numbers = empty(batch, positions, routes, rank + 2 * states, dtype=dtype)
    skip = empty(routes, channels) if optional else None
    weight, A, order = empty(routes, channels, rank), empty(routes, channels, states), empty(routes, steps).int()
    inputs = x, numbers, weight, A, order, skip, skip
    kernels, (y, chunk_states) = compiled(target, cross.forward, *inputs, True)
    kernels |= compiled(target, cross.backward, y, *inputs, chunk_states, True)[0]
    cut = {"segment_ends_kernel", "segment_messages_kernel", "carry_kernel"}
    assert kernels.keys() == {"scan_kernel", "backward_kernel"} | (cut if batch == 1 and steps > 1 else set())
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 64 * 1024, name
