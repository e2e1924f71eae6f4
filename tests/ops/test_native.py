"""What is special to the native CPU library: loading it, its instruction sets, threads, batches and NaN."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close

from vssm.ops import native
from vssm.ops.causal_conv1d import cpu as conv
from vssm.ops.causal_conv1d.reference import causal_conv1d_reference
from vssm.ops.cross_selective_scan import cpu as cross
from vssm.ops.cross_selective_scan.reference import cross_selective_scan_reference
from vssm.ops.local_bidirectional_scan import cpu as local_scan
from vssm.ops.local_bidirectional_scan.reference import local_bidirectional_scan_reference
from vssm.ops.selective_scan import cpu as scan
from vssm.ops.selective_scan.reference import selective_scan_reference
from vssm.ops.ssd import cpu as ssd
from vssm.ops.ssd.reference import ssd_reference


def scan_inputs(batch=2, channels=40, length=83, states=16, groups=1, seed=0):
    """u, delta, A, B, C, D, z, delta_bias and the gradient of the output."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    sequences = [normal(batch, channels, length) for _ in range(4)]
    u, delta, z, grad_out = sequences
    B, C = (normal(batch, groups, states, length) for _ in range(2))
    return [u, delta, -normal(channels, states).exp(), B, C, normal(channels), z, normal(channels)], grad_out


def run_scan(inputs, grad_out):
    """Outputs and gradients of the native kernel."""
    out, last_state, chunk_states = scan.forward(*inputs, True)
    return out, last_state, *scan.backward(grad_out, None, *inputs, chunk_states, True)


def run_conv(x, weight, bias, grad_out):
    return conv.forward(x, weight, bias, True), *conv.backward(grad_out, x, weight, bias, True)


def conv_inputs(batch=2, channels=5, length=61, taps=4):
    rng = torch.Generator().manual_seed(0)
    shapes = ((batch, channels, length), (channels, taps), (channels,), (batch, channels, length))
    return [torch.randn(shape, generator=rng) for shape in shapes]


@pytest.fixture
def with_threads():
    """Sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_sets(native_cpu, monkeypatch, tmp_path):
    """A function to loop over: yields the names of this machine's instruction sets while the kernels use that one."""
    best = native_cpu.vssm_simd_level().decode()
    libraries = {}
    for level in ("v2", "v3", "v4") if best.startswith("v") else (best,):
        if level <= best:
            # A library chooses once, so each instruction set takes a fresh copy.
            monkeypatch.setenv("VSSM_SIMD", level)
            libraries[level], reason = native.load(Path(shutil.copy(native_cpu._name, tmp_path / level)))
            assert libraries[level] is not None, reason

    def each():
        for level, library in libraries.items():
            monkeypatch.setattr(native, "library", library)
            yield level

    return each


def test_every_instruction_set_agrees_with_the_definition(instruction_sets):
    for shape in ({}, {"states": 1, "groups": 4}, {"states": 5, "channels": 3}):
        inputs, grad_out = scan_inputs(**shape)
        double = [x.double().requires_grad_() for x in inputs]
        out, last_state = selective_scan_reference(*double, True)
        want = out, last_state, *torch.autograd.grad(out, double, grad_out.double())
        for level in instruction_sets():
            for index, (got, wanted) in enumerate(zip(run_scan(inputs, grad_out), want, strict=True)):
                assert_close(got, wanted, torch.float32, f"{level}, {shape}, result {index}")


def test_every_instruction_set_convolves_like_the_definition(instruction_sets):
    for taps in (1, 4, 7):
        *inputs, grad_out = conv_inputs(taps=taps)
        double = [x.double().requires_grad_() for x in inputs]
        out = causal_conv1d_reference(*double, True)
        want = out, *torch.autograd.grad(out, double, grad_out.double())
        for level in instruction_sets():
            for index, (got, wanted) in enumerate(zip(run_conv(*inputs, grad_out), want, strict=True)):
                assert_close(got, wanted, torch.float32, f"{level}, {taps} taps, result {index}")


def test_every_instruction_set_looks_ahead_like_the_definition(instruction_sets):
    for window, shape in ((4, {}), (8, {"states": 1, "groups": 4}), (16, {"states": 5, "channels": 3})):
        inputs, grad_out = scan_inputs(**shape)
        double = [x.double().requires_grad_() for x in inputs]
        out = local_bidirectional_scan_reference(*double, True, window)
        want = out, *torch.autograd.grad(out, double, grad_out.double())
        for level in instruction_sets():
            got, chunk_states = local_scan.forward(*inputs, True, window)
            gradients = local_scan.backward(grad_out, *inputs, chunk_states, True, window)
            for index, (result, wanted) in enumerate(zip((got, *gradients), want, strict=True)):
                assert_close(result, wanted, torch.float32, f"{level}, window {window}, result {index}")


def test_every_instruction_set_scans_heads_like_the_definition(instruction_sets):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    settings = True, 0.0, 1.0
    for heads, width, groups, states in ((4, 20, 2, 16), (2, 3, 1, 5), (3, 33, 3, 64)):
        rows, states_shape = (2, 83, heads, width), (2, heads, width, states)
        x, z, grad_out = (normal(*rows) for _ in range(3))
        B, C = (normal(2, 83, groups, states) for _ in range(2))
        parameters = -normal(heads).exp(), B, C, normal(heads, width), z, normal(heads), normal(*states_shape)
        inputs, grad_final = (x, normal(*rows[:3]), *parameters), normal(*states_shape)
        double = [t.double().requires_grad_() for t in inputs]
        outputs = ssd_reference(*double, *settings)
        want = *outputs, *torch.autograd.grad(outputs, double, (grad_out.double(), grad_final.double()))
        for level in instruction_sets():
            got = ssd.forward(*inputs, *settings, 64)
            gradients = ssd.backward(grad_out, grad_final, *inputs, *settings, 64)
            for index, (result, wanted) in enumerate(zip((*got, *gradients), want, strict=True)):
                assert_close(result, wanted, torch.float32, f"{level}, {heads} heads, result {index}")


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, -1], ids=hex)
@pytest.mark.parametrize("argument", ["u", "delta", "z"])
@pytest.mark.parametrize("states", [1, 16])
def test_a_nan_reaches_its_channel_from_its_step_on_and_no_other(instruction_sets, states, argument, payload):
    inputs, _ = scan_inputs(batch=1, states=states)
    nan = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
    inputs["u delta A B C D z delta_bias".split().index(argument)][0, 7, 30] = nan
    for level in instruction_sets():
        out, last_state, *_ = scan.forward(*inputs, True)
        expected = torch.zeros_like(out, dtype=torch.bool)
        expected[0, 7, 30 : 31 if argument == "z" else None] = True
        assert torch.equal(out.isnan(), expected), level
        assert last_state[0, 7].isnan().all() == (argument != "z"), level


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_keep_infinity_nan_and_the_smallest_numbers(instruction_sets, dtype):
    info = torch.finfo(dtype)
    special = [torch.inf, -torch.inf, torch.nan, info.max, info.smallest_normal, info.smallest_normal / 64, -0.0, 1.0]
    x = torch.tensor(special, dtype=dtype).repeat(5)[None, None]
    one = torch.ones(1, 1)
    for level in instruction_sets():
        assert torch.equal(conv.forward(x, one, None, False).nan_to_num(nan=-7), x.nan_to_num(nan=-7)), level
        # Halfway between two numbers of the type: rounds to the even one.
        halfway = conv.forward(torch.full_like(x, 1), 1 + info.eps * torch.full((1, 1), 1.5), None, False)
        assert (halfway == 1 + 2 * info.eps).all(), level


@pytest.mark.parametrize("states", [1, 16])
def test_decay_that_grows_overflows_to_infinity_without_a_crash(native_cpu, states):
    inputs, _ = scan_inputs(states=states)
    inputs[2] = -inputs[2]
    out, *_ = scan.forward(*inputs, True)
    assert not out.isfinite().all() and out[..., 0].isfinite().all()


@pytest.mark.parametrize("shape", [{}, {"states": 1, "groups": 4}, {"states": 5, "channels": 300}], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(native_cpu, with_threads, shape):
    inputs, grad_out = scan_inputs(**shape)
    with_threads(1)
    want = *run_scan(inputs, grad_out), *run_conv(*conv_inputs())
    for threads in (2, 3, 7):
        with_threads(threads)
        for index, got in enumerate((*run_scan(inputs, grad_out), *run_conv(*conv_inputs()))):
            assert torch.equal(got, want[index]), (threads, index)


@pytest.mark.parametrize("states", [1, 16])
def test_an_item_gets_the_same_bits_alone_and_in_a_batch(native_cpu, states):
    inputs, grad_out = scan_inputs(batch=3, groups=2, states=states)
    per_item = (0, 1, 3, 4, 6)
    together = run_scan(inputs, grad_out)
    alone = run_scan([x[1:2] if i in per_item else x for i, x in enumerate(inputs)], grad_out[1:2])
    for index in (0, 1, *(2 + i for i in per_item)):
        assert torch.equal(alone[index], together[index][1:2]), index


def test_a_library_with_another_interface_number_is_refused_with_both_numbers(native_cpu, monkeypatch):
    monkeypatch.setattr(native, "ABI", 999)
    library, reason = native.load(Path(native_cpu._name))
    assert library is None
    assert "999" in reason and str(native_cpu.vssm_abi()) in reason and "reinstall" in reason


def test_an_instruction_set_that_does_not_exist_is_refused(native_cpu, monkeypatch, tmp_path):
    monkeypatch.setenv("VSSM_SIMD", "v9")
    library, reason = native.load(Path(shutil.copy(native_cpu._name, tmp_path / "copy")))
    assert library is None and "VSSM_SIMD=v9" in reason


def test_a_file_that_is_no_library_is_a_reason(tmp_path):
    (tmp_path / "text.so").write_text("not a library")
    library, reason = native.load(tmp_path / "text.so")
    assert library is None and "text.so cannot be loaded" in reason and "reinstall" in reason


def test_without_the_library_vssm_imports_says_why_and_computes():
    program = (
        "import torch, vssm.ops as ops; from vssm.ops import backends, native; assert native.library is None; "
        "print(ops.causal_conv1d(torch.ones(1, 1, 3), torch.ones(1, 2)).tolist(), backends.status()[0].reason)"
    )
    environment = os.environ | {"VSSM_NATIVE_LIB": "/nowhere/libvssm_cpu.so"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("[[[1.0, 2.0, 2.0]]] VSSM_NATIVE_LIB=/nowhere/libvssm_cpu.so is not a file")


def cross_inputs(batch=2, positions=45, channels=40, routes=3, states=1, rank=5, separate=False):
    """x, dt_b_c, dt_weight, A, order, D, delta_bias and the gradient of the output."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    x, grad_y = (normal(batch, positions, *([routes] if separate else []), channels) for _ in range(2))
    order = torch.stack([torch.randperm(positions + 2, generator=rng) for _ in range(routes)])
    order = torch.where(order < positions, order, -1).int()
    dt_b_c, weight = normal(batch, positions, routes, rank + 2 * states), normal(routes, channels, rank)
    A, D, bias = -normal(routes, channels, states).exp(), normal(routes, channels), normal(routes, channels)
    return [x, dt_b_c, weight, A, order, D, bias], grad_y


def run_cross(inputs, grad_y):
    y, chunk_states = cross.forward(*inputs, True)
    return y, chunk_states, *cross.backward(grad_y, *inputs, chunk_states, True)


CROSS_SHAPES = [{}, {"states": 16, "separate": True}, {"states": 5, "channels": 131, "rank": 17}]


def test_every_instruction_set_scans_routes_like_the_definition(instruction_sets):
    for shape in CROSS_SHAPES:
        inputs, grad_y = cross_inputs(**shape)
        double = [x if x.dtype == torch.int32 else x.double().requires_grad_() for x in inputs]
        y = cross_selective_scan_reference(*double, True)
        want = y, *torch.autograd.grad(y, [x for x in double if x.requires_grad], grad_y.double())
        for level in instruction_sets():
            y, _, *grads = run_cross(inputs, grad_y)
            for index, (got, wanted) in enumerate(zip((y, *grads), want, strict=True)):
                assert_close(got, wanted, torch.float32, f"{level}, {shape}, result {index}")


@pytest.mark.parametrize("shape", CROSS_SHAPES, ids=str)
def test_results_of_routes_depend_neither_on_threads_nor_on_the_batch(native_cpu, with_threads, shape):
    inputs, grad_y = cross_inputs(**shape)
    with_threads(1)
    want = run_cross(inputs, grad_y)
    for threads in (2, 3, 7):
        with_threads(threads)
        for index, got in enumerate(run_cross(inputs, grad_y)):
            assert torch.equal(got, want[index]), (threads, index)
    alone = run_cross([x[1:2] if i < 2 else x for i, x in enumerate(inputs)], grad_y[1:2])
    for index in range(4):
        assert torch.equal(alone[index], want[index][1:2]), index


def test_table_values_that_are_no_position_are_padding(native_cpu):
    inputs, grad_y = cross_inputs()
    want = run_cross(inputs, grad_y)
    order = inputs[4]
    wild = torch.tensor([-(2**31), 2**31 - 1, 45], dtype=torch.int32).repeat(order.shape[1])[: order.shape[1]]
    inputs[4] = torch.where(order < 0, wild, order)
    for got, wanted in zip(run_cross(inputs, grad_y), want, strict=True):
        assert torch.equal(got, wanted)
