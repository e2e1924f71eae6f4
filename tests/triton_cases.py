"""Checks of the Triton kernels that run in a process of their own, where Triton interprets kernels on the CPU.

Whether Triton interprets is decided when triton is imported, which importing torch may do, so tests/ops/test_triton.py
starts a process with TRITON_INTERPRET=1 and calls these functions there; on a machine with a GPU it calls them itself.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import torch
from extremes import DECAYS, extreme_steps
from tolerances import assert_close, assert_finite_where_it_fits

from vssm import ops
from vssm.ops.causal_conv1d import op as conv_op
from vssm.ops.causal_conv1d import triton as conv
from vssm.ops.causal_conv1d.reference import causal_conv1d_reference
from vssm.ops.cross_selective_scan import op as cross_op
from vssm.ops.cross_selective_scan import triton as cross
from vssm.ops.cross_selective_scan.portable import cross_selective_scan_forward
from vssm.ops.cross_selective_scan.reference import cross_selective_scan_reference
from vssm.ops.local_bidirectional_scan import op as local_op
from vssm.ops.local_bidirectional_scan import triton as local_scan
from vssm.ops.local_bidirectional_scan.chunks import windowed_chunk_length
from vssm.ops.local_bidirectional_scan.portable import (
    local_bidirectional_scan_backward,
    local_bidirectional_scan_forward,
)
from vssm.ops.local_bidirectional_scan.reference import local_bidirectional_scan_reference
from vssm.ops.selective_scan import op as scan_op
from vssm.ops.selective_scan import triton as scan
from vssm.ops.selective_scan.chunks import num_chunks
from vssm.ops.selective_scan.reference import selective_scan_reference
from vssm.ops.ssd import op as ssd_op
from vssm.ops.ssd import triton as ssd
from vssm.ops.ssd.portable import ssd_backward, ssd_forward
from vssm.ops.ssd.reference import ssd_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCAN_NAMES = "u delta A B C D z delta_bias".split()
SSD_NAMES = "x dt A B C D z dt_bias initial_states".split()
CROSS_NAMES = "x dt_b_c dt_weight A order D delta_bias".split()


def check_interpreter():
    """Raises what Triton's interpreter raises if it cannot run a loop, as with a NumPy newer than it knows."""
    scan.carry_kernel[(1,)](
        *(torch.ones(1), torch.ones(1), torch.ones(1), None, torch.ones(1), 1, 1, 1, 1),
        **{"REVERSE": False, "CHANNELS": 1, "TILE": 2},
    )


@contextlib.contextmanager
def _set(module, **values):
    """Sets attributes of a module for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _poisoned_memory():
    """Fills what torch.empty and friends return with NaN, so that an output nobody writes shows."""

    def poison(function):
        def poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    with (
        _set(torch, empty=poison(torch.empty), empty_like=poison(torch.empty_like)),
        _set(torch.Tensor, new_empty=poison(torch.Tensor.new_empty)),
    ):
        yield


def scan_inputs(batch, channels, length, states, groups, dtype=torch.float32, absent=(), seed=0):
    """The eight inputs of the scan, None for absent ones, and the gradients of out and of the last state."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    inputs = {
        "u": normal(batch, channels, length).to(dtype),
        "delta": (normal(batch, channels, length) - 1).to(dtype),
        "A": -torch.exp(normal(channels, states) / 2),
        "B": normal(batch, groups, states, length).to(dtype),
        "C": normal(batch, groups, states, length).to(dtype),
        "D": normal(channels),
        "z": normal(batch, channels, length).to(dtype),
        "delta_bias": normal(channels) / 2,
    }
    # Eighths are exact in every dtype, so that rounding them is no part of the error.
    gradients = [
        normal(*shape).mul(8).round().div(8) for shape in ((batch, channels, length), (batch, channels, states))
    ]
    inputs = [None if name in absent else inputs[name].to(DEVICE) for name in SCAN_NAMES]
    return inputs, [gradients[0].to(dtype).to(DEVICE), gradients[1].to(DEVICE)]


def run_scan(inputs, gradients, softplus=True, cut=False):
    """{name: tensor} of the outputs and gradients of the kernels, with sequences cut into segments or not."""
    with _set(scan, FULL_WARPS=10**9 if cut else 0), _poisoned_memory():
        out, last_state, chunk_states = scan.forward(*inputs, softplus)
        results = scan.backward(*gradients, *inputs, chunk_states, softplus)
    named = {f"d{name}": x for name, x in zip(SCAN_NAMES, results, strict=True)}
    return {"out": out, "last_state": last_state, "chunk_states": chunk_states} | named


def definition(reference, names, inputs, outputs, gradients, *settings):
    """{name: tensor} of what the float64 definition of an op gives, outputs (named) and gradients of inputs (named)."""
    leaves = [None if x is None else x.detach().cpu().double().requires_grad_() for x in inputs]
    results = reference(*leaves, *settings)
    results = dict(zip(outputs, (results,) if torch.is_tensor(results) else results, strict=True))
    loss = sum((x * g.cpu().double()).sum() for x, g in zip(results.values(), gradients, strict=True) if g is not None)
    present = {name: x for name, x in zip(names, leaves, strict=True) if x is not None}
    grads = torch.autograd.grad(loss, list(present.values()))
    return results | {f"d{name}": g for name, g in zip(present, grads, strict=True)}


def scan_definition(inputs, gradients, softplus=True):
    """{name: tensor} of what the float64 definition gives."""
    return definition(selective_scan_reference, SCAN_NAMES, inputs, ("out", "last_state"), gradients, softplus)


def check_scan(shape, dtype=torch.float32, cut=False, absent=(), softplus=True, last_state_gradient=True):
    inputs, gradients = scan_inputs(*shape, dtype=dtype, absent=absent)
    if not softplus:
        inputs[1] = inputs[1].abs()
    if not last_state_gradient:
        gradients[1] = None
    got, want = run_scan(inputs, gradients, softplus, cut), scan_definition(inputs, gradients, softplus)
    for name, tensor in want.items():
        assert_close(got[name], tensor, got[name].dtype, name)
    for name in absent:
        assert got[f"d{name}"].shape == (0,)
    assert got["out"].dtype == dtype
    for name, x in zip(SCAN_NAMES, inputs, strict=True):
        assert x is None or got[f"d{name}"].dtype == x.dtype
    # Chunk states are states: those of the same sequence, broken off at the chunk's start.
    steps = scan.chunk_length(shape[2])
    for chunk in range(1, num_chunks(shape[2])):
        short = [x[..., : chunk * steps] if x is not None and x.ndim > 2 else x for x in inputs]
        before = selective_scan_reference(*[None if x is None else x.cpu().double() for x in short], softplus)[1]
        assert_close(got["chunk_states"][:, :, chunk], before, torch.float32, f"chunk state {chunk}")
    assert not got["chunk_states"][:, :, 0].any()


def check_scan_repeats_bit_by_bit(cut):
    inputs, gradients = scan_inputs(1, 6, 33, 2, 1)
    first, second = (run_scan(inputs, gradients, cut=cut) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def check_scan_item_does_not_depend_on_its_batch():
    inputs, gradients = scan_inputs(2, 4, 19, 2, 1)
    per_item = [0, 1, 3, 4, 6]
    alone = run_scan([x[1:] if i in per_item else x for i, x in enumerate(inputs)], [g[1:] for g in gradients])
    together = run_scan(inputs, gradients)
    for name in ("out", "last_state", *(f"d{SCAN_NAMES[i]}" for i in per_item)):
        assert torch.equal(alone[name], together[name][1:]), name


def check_scan_of_an_empty_batch():
    got = run_scan(*scan_inputs(0, 6, 9, 4, 2))
    assert got["out"].shape == (0, 6, 9) and got["last_state"].shape == (0, 6, 4)
    assert got["dB"].shape == (0, 2, 4, 9)
    for name in ("dA", "dD", "ddelta_bias"):
        assert not got[name].any(), name


def check_scan_leaves_float64_to_the_portable_form():
    inputs, gradients = scan_inputs(1, 2, 5, 2, 1)
    inputs, gradients = ([x.double() for x in tensors] for tensors in (inputs, gradients))
    got, want = run_scan(inputs, gradients), scan_definition(inputs, gradients)
    for name, tensor in want.items():
        assert_close(got[name], tensor, torch.float64, name)


def run_local_scan(inputs, grad_out, window, softplus=True, cut=False):
    """{name: tensor} of the output, chunk states and gradients of the kernels."""
    with _set(scan, FULL_WARPS=10**9 if cut else 0), _poisoned_memory():
        out, chunk_states = local_scan.forward(*inputs, softplus, window)
        results = local_scan.backward(grad_out, *inputs, chunk_states, softplus, window)
    named = {f"d{name}": x for name, x in zip(SCAN_NAMES, results, strict=True)}
    return {"out": out, "chunk_states": chunk_states} | named


def check_local_scan(shape, window, dtype=torch.float32, cut=False, absent=(), softplus=True):
    inputs, (grad_out, _) = scan_inputs(*shape, dtype=dtype, absent=absent)
    if not softplus:
        inputs[1] = inputs[1].abs()
    got = run_local_scan(inputs, grad_out, window, softplus, cut)
    settings = (softplus, window)
    want = definition(local_bidirectional_scan_reference, SCAN_NAMES, inputs, ["out"], [grad_out], *settings)
    wide = [None if x is None else x.cpu().double() for x in inputs]
    want["chunk_states"] = local_bidirectional_scan_forward(*wide, *settings)[1]
    for name, tensor in want.items():
        assert_close(got[name], tensor, got[name].dtype, name)
    for name, x in zip(SCAN_NAMES, inputs, strict=True):
        assert got[f"d{name}"].shape == (0,) if x is None else got[f"d{name}"].dtype == x.dtype
    assert got["out"].dtype == dtype


def check_local_scan_repeats_bit_by_bit(cut):
    inputs, (grad_out, _) = scan_inputs(1, 6, 33, 2, 1)
    first, second = (run_local_scan(inputs, grad_out, 8, cut=cut) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def check_local_scan_with_one_step_a_window_is_the_scan():
    inputs, (grad_out, _) = scan_inputs(1, 3, 21, 2, 1)
    got, want = run_local_scan(inputs, grad_out, 1), run_scan(inputs, (grad_out, None))
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), name


def check_local_scan_of_an_empty_batch():
    inputs, (grad_out, _) = scan_inputs(0, 6, 9, 4, 2)
    got = run_local_scan(inputs, grad_out, 4)
    assert got["out"].shape == (0, 6, 9) and got["dB"].shape == (0, 2, 4, 9)
    for name in ("dA", "dD", "ddelta_bias"):
        assert not got[name].any(), name


def check_local_scan_leaves_other_windows_to_the_portable_form(window, dtype):
    inputs, (grad_out, _) = scan_inputs(1, 2, 40, 2, 1)
    inputs, grad_out = [x.to(dtype) for x in inputs], grad_out.to(dtype)
    got = run_local_scan(inputs, grad_out, window)
    out, chunk_states = local_bidirectional_scan_forward(*inputs, True, window)
    assert torch.equal(got["out"], out) and torch.equal(got["chunk_states"], chunk_states)
    want = local_bidirectional_scan_backward(grad_out, *inputs, chunk_states, True, window)
    for name, tensor in zip(SCAN_NAMES, want, strict=True):
        assert torch.equal(got[f"d{name}"], tensor), name
    assert chunk_states.shape[2] == -(-40 // windowed_chunk_length(40, window))


def check_local_scan_is_finite_for_extreme_steps_and_decays(dtype):
    length = 48
    inputs, (grad_out, _) = scan_inputs(1, len(DECAYS), length, 1, 1, dtype=dtype, absent=("delta_bias",))
    inputs[1] = extreme_steps((1, len(DECAYS), length), 2, dtype).to(DEVICE)
    inputs[2] = torch.tensor(DECAYS)[:, None].to(DEVICE)
    wide = [x if x is None or x.dtype == torch.float32 else x.float() for x in inputs]
    got = run_local_scan(inputs, grad_out, 16, softplus=False, cut=True)
    for name, tensor in run_local_scan(wide, grad_out.float(), 16, softplus=False, cut=True).items():
        assert_finite_where_it_fits(got[name], tensor, name)


def ssd_inputs(batch, length, heads, width, groups, states, dtype=torch.float32, absent=(), wide_D=False):
    """The nine inputs of Mamba-2's scan, None for absent ones, and the gradients of out and of the final states."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    inputs = {
        "x": normal(batch, length, heads, width).to(dtype),
        "dt": (normal(batch, length, heads) - 1).to(dtype),
        "A": -torch.exp(normal(heads) / 2),
        "B": normal(batch, length, groups, states).to(dtype),
        "C": normal(batch, length, groups, states).to(dtype),
        "D": normal(heads, width) if wide_D else normal(heads),
        "z": normal(batch, length, heads, width).to(dtype),
        "dt_bias": normal(heads) / 2,
        "initial_states": normal(batch, heads, width, states),
    }
    gradients = [normal(*inputs[name].shape).mul(8).round().div(8) for name in ("x", "initial_states")]
    inputs = [None if name in absent else inputs[name].to(DEVICE) for name in SSD_NAMES]
    return inputs, [gradients[0].to(dtype).to(DEVICE), gradients[1].to(DEVICE)]


def run_ssd(inputs, gradients, softplus=True, limits=(0.0, math.inf), programs=ssd.FULL_PROGRAMS):
    """{name: tensor} of the outputs and gradients of the kernels, aiming at so many programs for those of B and C."""
    settings = (softplus, *limits, 64)
    with _set(ssd, FULL_PROGRAMS=programs), _poisoned_memory():
        outputs = ssd.forward(*inputs, *settings)
        results = ssd.backward(*gradients, *inputs, *settings)
    named = {f"d{name}": x for name, x in zip(SSD_NAMES, results, strict=True)}
    return dict(zip(("out", "final_states"), outputs, strict=True)) | named


def _check_ssd(inputs, gradients, softplus=True, limits=(0.0, math.inf), **how):
    got = run_ssd(inputs, gradients, softplus, limits, **how)
    outputs = ("out", "final_states")
    for name, tensor in definition(ssd_reference, SSD_NAMES, inputs, outputs, gradients, softplus, *limits).items():
        assert_close(got[name], tensor, got[name].dtype, name)
    for name, x in zip(SSD_NAMES, inputs, strict=True):
        assert got[f"d{name}"].shape == (0,) if x is None else got[f"d{name}"].dtype == x.dtype
    assert got["out"].dtype == inputs[0].dtype and got["final_states"].dtype == torch.float32
    return got


def check_ssd(shape, dtype=torch.float32, absent=(), softplus=True, wide_D=False, **how):
    inputs, gradients = ssd_inputs(*shape, dtype=dtype, absent=absent, wide_D=wide_D)
    if not softplus:
        inputs[1] = inputs[1].abs()
    _check_ssd(inputs, gradients, softplus, **how)


def check_ssd_without_gradient_of_the_final_states():
    inputs, gradients = ssd_inputs(1, 20, 2, 3, 1, 2)
    _check_ssd(inputs, [gradients[0], None])


def check_ssd_takes_wider_step_sizes(dtype):
    inputs, gradients = ssd_inputs(1, 20, 2, 3, 1, 2, dtype=dtype)
    inputs[1] = inputs[1].float()
    _check_ssd(inputs, gradients)


def check_ssd_limits_step_sizes():
    inputs, gradients = ssd_inputs(1, 35, 2, 3, 1, 2)
    inside = _check_ssd(inputs, gradients, limits=(0.2, 0.6))["ddt"] != 0
    sizes = torch.nn.functional.softplus(inputs[1] + inputs[7])
    assert torch.equal(inside, (sizes > 0.2) & (sizes < 0.6)) and inside.any() and not inside.all()


def check_ssd_with_strong_decay_and_long_memory():
    inputs, gradients = ssd_inputs(1, 150, 3, 2, 1, 2)
    inputs[2] = torch.tensor([-80.0, -1e-4, -1.0], device=DEVICE)
    _check_ssd(inputs, gradients)


def check_ssd_after_huge_steps():
    inputs, gradients = ssd_inputs(1, 64, 2, 3, 1, 2, absent=("dt_bias",))
    huge = torch.arange(64, device=DEVICE)[:, None] % 9 == 3
    inputs[1] = torch.where(huge, 5e4, 0.01).expand(1, 64, 2).contiguous()
    inputs[2] = torch.tensor([-1.0, -20.0], device=DEVICE)
    inputs[0] = torch.where(huge[..., None], 0.0, inputs[0])
    _check_ssd(inputs, gradients, softplus=False)


def check_ssd_is_finite_for_extreme_steps_and_decays(dtype):
    inputs, gradients = ssd_inputs(1, 300, len(DECAYS), 2, 1, 2, dtype=dtype, absent=("dt_bias",))
    inputs[1] = extreme_steps((1, 300, len(DECAYS)), 1, dtype).to(DEVICE)
    inputs[2] = torch.tensor(DECAYS, device=DEVICE)
    wide = [x if x is None else x.float() for x in inputs]
    got = run_ssd(inputs, gradients, softplus=False)
    for name, tensor in run_ssd(wide, [g.float() for g in gradients], softplus=False).items():
        assert_finite_where_it_fits(got[name], tensor, name)


def check_ssd_repeats_bit_by_bit():
    inputs, gradients = ssd_inputs(2, 70, 2, 2, 1, 2)
    first, second = (run_ssd(inputs, gradients) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def check_ssd_of_an_item_does_not_depend_on_its_batch():
    inputs, gradients = ssd_inputs(2, 19, 2, 3, 1, 2)
    per_item = [0, 1, 3, 4, 6, 8]
    alone = run_ssd([x[1:] if i in per_item else x for i, x in enumerate(inputs)], [g[1:] for g in gradients])
    together = run_ssd(inputs, gradients)
    for name in ("out", "final_states", *(f"d{SSD_NAMES[i]}" for i in per_item)):
        assert torch.equal(alone[name], together[name][1:]), name


def check_ssd_of_an_empty_batch():
    got = run_ssd(*ssd_inputs(0, 9, 4, 3, 2, 5))
    assert got["out"].shape == (0, 9, 4, 3) and got["final_states"].shape == (0, 4, 3, 5)
    assert got["dB"].shape == (0, 9, 2, 5)
    for name in ("dA", "dD", "ddt_bias"):
        assert not got[name].any(), name


def check_ssd_leaves_other_dtypes_to_the_portable_form():
    inputs, gradients = ssd_inputs(1, 9, 2, 3, 1, 2)
    mixed = [*inputs[:3], inputs[3].bfloat16(), *inputs[4:]]
    for changed, cotangents in (
        ([x.double() for x in inputs], [g.double() for g in gradients]),
        (mixed, gradients),
    ):
        got = run_ssd(changed, cotangents)
        settings = (True, 0.0, math.inf, 64)
        want = *ssd_forward(*changed, *settings), *ssd_backward(*cotangents, *changed, *settings)
        for (name, tensor), portable in zip(got.items(), want, strict=True):
            assert torch.equal(tensor, portable), name


def _tf32(x):
    """float32 rounded to the 11 significant bits of TF32."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def check_ssd_with_products_rounded_as_matrix_units_round(dtype):
    """The interpreter multiplies in float32 whatever precision a kernel asks for; here as NVIDIA's units then do."""
    from triton.runtime import interpreter

    asked = set()

    def create_dot(self, a, b, accumulator, precision, max_num_imprecise_acc):
        name = str(precision).rpartition(".")[2]
        asked.add(name)
        highs = [_tf32(x.data) for x in (a, b)]
        product = highs[0] @ highs[1]
        if name == "TF32x3":
            lows = [_tf32(x.data - high) for x, high in zip((a, b), highs, strict=True)]
            product += lows[0] @ highs[1] + highs[0] @ lows[1]
        return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    with _set(interpreter.InterpreterBuilder, create_dot=create_dot):
        check_ssd((1, 40, 2, 16, 1, 16), dtype)
    assert asked == ({"TF32x3"} if dtype == torch.float32 else {"TF32", "TF32x3"})


def check_carry(segments, reverse, first, sharing=1):
    """The carry kernel with small tiles against a loop."""
    batch, states, columns = 2, 3, 5
    channels = columns * sharing
    rng = torch.Generator().manual_seed(0)
    A = -torch.rand(states, columns, generator=rng)
    ends = torch.randn(batch, segments, states, channels, generator=rng)
    dt_sums = torch.rand(batch, segments, columns, generator=rng)
    value = torch.randn(batch, states, channels, generator=rng) if first else torch.zeros(batch, states, channels)
    start, want = value, torch.empty_like(ends)
    for segment in reversed(range(segments)) if reverse else range(segments):
        want[:, segment] = value
        decay = torch.exp(A * dt_sums[:, segment, None]).repeat_interleave(sharing, -1)
        value = decay * value + ends[:, segment]
    got = torch.full_like(want, float("nan")).to(DEVICE)
    A, ends, dt_sums, start = (x.contiguous().to(DEVICE) for x in (A, ends, dt_sums, start))
    scan.carry_kernel[(batch * states * -(-channels // 2),)](
        *(A, ends, dt_sums, start if first else None, got, channels, sharing, states, segments),
        **{"REVERSE": reverse, "CHANNELS": 2, "TILE": 4, "num_warps": 1},
    )
    assert_close(got, want, torch.float32, "entering")


def conv_inputs(batch, channels, length, taps, dtype=torch.float32, bias=True):
    """x, weight, bias or None, and the gradient of the output."""
    rng = torch.Generator().manual_seed(0)
    sequences = [torch.randn(batch, channels, length, generator=rng) for _ in range(2)]
    weight, bias_values = torch.randn(channels, taps, generator=rng), torch.randn(channels, generator=rng)
    x, grad_out = sequences[0].to(dtype), sequences[1].mul(8).round().div(8).to(dtype)
    return [None if t is None else t.to(DEVICE) for t in (x, weight, bias_values if bias else None, grad_out)]


def run_conv(x, weight, bias, grad_out, silu):
    """out, dx, dweight, dbias of the kernels."""
    with _poisoned_memory():
        return conv.forward(x, weight, bias, silu), *conv.backward(grad_out, x, weight, bias, silu)


def check_conv(shape, dtype=torch.float32, silu=True, bias=True, weight_dtype=torch.float32):
    x, weight, bias, grad_out = conv_inputs(*shape, dtype=dtype, bias=bias)
    weight, bias = (None if t is None else t.to(weight_dtype) for t in (weight, bias))
    got = run_conv(x, weight, bias, grad_out, silu)
    leaves = [None if t is None else t.cpu().double().requires_grad_() for t in (x, weight, bias)]
    want = causal_conv1d_reference(*leaves, silu)
    want = [want, *torch.autograd.grad(want, [t for t in leaves if t is not None], grad_out.cpu().double())]
    for name, tensor, definition in zip(("out", "dx", "dweight", "dbias"), got, want, strict=False):
        assert_close(tensor, definition, tensor.dtype, name)
    assert [t.dtype for t in got] == [dtype, dtype, weight_dtype, weight_dtype]
    assert got[3].shape == ((0,) if bias is None else bias.shape)


def check_conv_repeats_bit_by_bit():
    inputs = conv_inputs(2, 3, 70, 4)
    for first, second in zip(*(run_conv(*inputs, True) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def check_conv_of_an_empty_batch():
    out, dx, dweight, dbias = run_conv(*conv_inputs(0, 6, 9, 4), True)
    assert out.shape == dx.shape == (0, 6, 9)
    assert torch.equal(dweight.cpu(), torch.zeros(6, 4)) and torch.equal(dbias.cpu(), torch.zeros(6))


def cross_inputs(batch, positions, channels, routes, steps, states, rank, own=False, dtype=torch.float32, absent=()):
    """The seven inputs of the scan along routes, None for absent ones, and the gradient of y.

    Routes that are longer than the map is large have steps of padding, shorter ones leave positions out.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    order = torch.full((routes, steps), -1, dtype=torch.int32)
    for table in order:
        visited = torch.randperm(positions, generator=rng)[:steps]
        table[torch.randperm(steps, generator=rng)[: len(visited)].sort().values] = visited.int()
    shape = (batch, positions, routes, channels) if own else (batch, positions, channels)
    inputs = {
        "x": normal(*shape).to(dtype),
        "dt_b_c": normal(batch, positions, routes, rank + 2 * states).to(dtype),
        "dt_weight": normal(routes, channels, rank) / rank**0.5,
        "A": -torch.exp(normal(routes, channels, states) / 2),
        "order": order,
        "D": normal(routes, channels),
        "delta_bias": normal(routes, channels) / 2 - 1,
    }
    grad_y = normal(*shape).mul(8).round().div(8).to(dtype)
    return [None if name in absent else inputs[name].to(DEVICE) for name in CROSS_NAMES], grad_y.to(DEVICE)


def run_cross(inputs, grad_y, softplus=True, way="together"):
    """y, chunk states and gradients of the kernels; programs walk all routes, or one, or segments of one."""
    warps = {"together": 0, "apart": 10**9, "segments": 10**9}[way]
    with (
        _set(cross, TOGETHER_WARPS=warps),
        _set(scan, FULL_WARPS=10**9 if way == "segments" else 0),
        _poisoned_memory(),
    ):
        y, chunk_states = cross.forward(*inputs, softplus)
        return y, chunk_states, *cross.backward(grad_y, *inputs, chunk_states, softplus)


def check_cross(shape, way="together", dtype=torch.float32, absent=(), softplus=True, own=False):
    inputs, grad_y = cross_inputs(*shape, own=own, dtype=dtype, absent=absent)
    y, chunk_states, *gradients = run_cross(inputs, grad_y, softplus, way)
    exact = [t if t is None else t.cpu() if t.dtype == torch.int32 else t.cpu().double() for t in inputs]
    assert_close(chunk_states, cross_selective_scan_forward(*exact, softplus)[1], torch.float32, "chunk states")
    leaves = [t for t in exact if t is not None and t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    want = cross_selective_scan_reference(*exact, softplus)
    assert_close(y, want, dtype, "y")
    want = iter(torch.autograd.grad(want, leaves, grad_y.cpu().double()))
    names = [name for name in CROSS_NAMES if name != "order"]
    for name, got in zip(names, gradients, strict=True):
        if name in absent:
            assert got.shape == (0,)
        else:
            assert got.dtype == inputs[CROSS_NAMES.index(name)].dtype
            assert_close(got, next(want), got.dtype, f"d{name}")


def check_cross_repeats_bit_by_bit(way):
    inputs, grad_y = cross_inputs(1, 33, 2, 1, 33, 1, 1) if way == "segments" else cross_inputs(1, 12, 3, 2, 12, 1, 2)
    for first, second in zip(*(run_cross(inputs, grad_y, way=way) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def check_cross_takes_any_number_that_is_no_position_for_padding():
    inputs, grad_y = cross_inputs(1, 9, 3, 2, 12, 1, 2)
    strange = inputs.copy()
    strange[4] = torch.where(inputs[4] < 0, torch.tensor([[9], [-7]], device=DEVICE, dtype=torch.int32), inputs[4])
    assert not torch.equal(strange[4], inputs[4])
    for got, want in zip(run_cross(strange, grad_y), run_cross(inputs, grad_y), strict=True):
        assert torch.equal(got, want)


def check_cross_of_an_empty_batch():
    y, _, dx, dnumbers, *parameters = run_cross(*cross_inputs(0, 9, 4, 2, 9, 1, 2))
    assert y.shape == dx.shape == (0, 9, 4) and dnumbers.shape == (0, 9, 2, 4)
    assert not any(gradient.any() for gradient in parameters)


def check_cross_leaves_what_is_too_large_to_the_portable_form():
    for shape, double in (((1, 5, 2, 1, 5, 1, 65), False), ((1, 5, 2, 2, 5, 1, 1), True)):
        inputs, grad_y = cross_inputs(*shape)
        if double:
            inputs = [t if t.dtype == torch.int32 else t.double() for t in inputs]
            grad_y = grad_y.double()
        portable = cross_selective_scan_forward(*inputs, True)
        y, chunk_states, *_ = run_cross(inputs, grad_y)
        assert torch.equal(y, portable[0]) and torch.equal(chunk_states, portable[1])


def _register(module, kernels):
    """The kernels in the place of those of the native library."""
    for op, kernel in ((module.forward_op, kernels.forward), (module.backward_op, kernels.backward)):
        op.register_kernel(DEVICE)(kernel)


def _check_op(module, kernels, arguments):
    """What the kernels return must suit the dispatcher."""
    _register(module, kernels)
    leaves = [t.requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments]
    torch.library.opcheck(module.forward_op, leaves, test_utils=("test_schema", "test_autograd_registration"))
    results = module.forward_op(*leaves)
    out = results if torch.is_tensor(results) else results[0]
    out.float().sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad)


def check_the_dispatcher_takes_what_the_kernels_return(op):
    # One of everything: tensors of one number are contiguous however they were cut out of others.
    if op == "selective_scan":
        _check_op(scan_op, scan, (*scan_inputs(1, 1, 1, 1, 1)[0], True))
    elif op == "local_bidirectional_scan":
        _check_op(local_op, local_scan, (*scan_inputs(1, 1, 1, 1, 1)[0], True, 2))
    elif op == "ssd":
        _check_op(ssd_op, ssd, (*ssd_inputs(1, 1, 1, 1, 1, 1)[0], True, 0.0, math.inf, 64))
    elif op == "causal_conv1d":
        _check_op(conv_op, conv, (*conv_inputs(1, 1, 1, 1)[:3], True))
    else:
        _check_op(cross_op, cross, (*cross_inputs(1, 1, 1, 1, 1, 1, 1)[0], True))


def check_non_contiguous_inputs_give_the_same_numbers(op):
    """Through the public function, which runs the kernels."""
    if op == "ssd":
        _register(ssd_op, ssd)
        inputs = dict(zip(SSD_NAMES, ssd_inputs(2, 20, 2, 3, 1, 2)[0], strict=True))
        function, settings = ops.ssd, {"dt_softplus": True}
    else:
        _register(local_op, local_scan)
        inputs = dict(zip(SCAN_NAMES, scan_inputs(1, 3, 10, 2, 1)[0], strict=True))
        function, settings = ops.local_bidirectional_scan, {"delta_softplus": True, "window": 8}
    changed = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in changed.values())
    results = []
    for tensors in (inputs, changed):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out = function(**leaves, **settings)
        # The gradient of the output is not contiguous either.
        gradients = torch.autograd.grad(out.transpose(-1, -2).square().sum(), list(leaves.values()))
        results.append([out, *gradients])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
