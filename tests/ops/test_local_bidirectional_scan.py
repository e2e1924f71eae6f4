"""Every implementation of the locally bi-directional scan against its float64 definition, with every gradient."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
from extremes import DECAYS, extreme_steps
from tolerances import assert_close, assert_finite_where_it_fits, relative_rms

from vssm.ops import local_bidirectional_scan, native, selective_scan, use_portable, use_reference
from vssm.ops.local_bidirectional_scan import official_window
from vssm.ops.local_bidirectional_scan.chunks import windowed_chunk_length, windowed_num_chunks
from vssm.ops.local_bidirectional_scan.op import backward_op, forward_op

GOLDEN = parity.load(Path(__file__).parents[1] / "golden" / "lbmamba_scan.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("D", "z", "delta_bias")
SHAPES = [  # batch, channels, length, states, groups, window
    (2, 6, 37, 3, 2, 4),
    (1, 4, 1, 2, 1, 8),
    (3, 1, 2, 1, 1, 2),
    (2, 24, 63, 16, 4, 8),
    (1, 70, 130, 1, 2, 16),
    (2, 33, 257, 5, 1, None),
    (1, 16, 1000, 16, 1, None),
    (1, 3, 40, 256, 1, 16),
    (2, 5, 50, 4, 1, 7),
    (1, 4, 300, 2, 2, 100),
]


def scan_inputs(batch, channels, length, states, groups, dtype=torch.float32, absent=()):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0, shift=0.0):
        return scale * torch.randn(*shape, generator=rng, dtype=torch.float64) + shift

    inputs = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length, shift=-1.0),
        "A": -torch.exp(normal(channels, states, scale=0.5)),
        "B": normal(batch, groups, states, length),
        "C": normal(batch, groups, states, length),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels, scale=0.5),
    }
    for name, tensor in inputs.items():
        parameter = name in ("A", "D", "delta_bias")
        inputs[name] = tensor.to(torch.float32 if parameter and dtype != torch.float64 else dtype)
    return {name: tensor for name, tensor in inputs.items() if name not in absent}


def output_and_gradients(inputs, window, softplus=True, dtype=None):
    """{name: tensor} of the output and the gradient of every input, for a fixed random cotangent."""
    inputs = {k: (v if dtype is None else v.to(dtype)).detach().clone().requires_grad_() for k, v in inputs.items()}
    out = local_bidirectional_scan(**inputs, delta_softplus=softplus, window=window)
    # Eighths are exact in every dtype, so that rounding the cotangent is no part of the error.
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).mul(8).round().div(8)
    gradients = torch.autograd.grad(out, list(inputs.values()), cotangent.to(out.dtype))
    return {"out": out} | {f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}


@pytest.fixture(params=["portable", "native"])
def implementation(request):
    """A context inside which the implementation of that name serves CPU tensors."""
    if request.param == "portable":
        return use_portable
    request.getfixturevalue("native_cpu")
    return contextlib.nullcontext


def check_against_definition(implementation, inputs, window, softplus=True):
    with use_reference():
        want = output_and_gradients(inputs, window, softplus, torch.float64)
    with implementation():
        got = output_and_gradients(inputs, window, softplus)
    for name, tensor in got.items():
        assert_close(tensor, want[name], tensor.dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_agree_with_the_definition(implementation, poisoned_memory, shape, dtype):
    *sizes, window = shape
    check_against_definition(implementation, scan_inputs(*sizes, dtype=dtype), window)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), OPTIONAL], ids="-".join)
@pytest.mark.parametrize("softplus", [True, False])
def test_optional_inputs_can_be_left_out(implementation, absent, softplus):
    inputs = scan_inputs(2, 20, 45, 4, 2, absent=absent)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
    check_against_definition(implementation, inputs, 8, softplus)


def golden_inputs():
    transform = {"A": lambda x: -np.exp(0.5 * x), "delta_bias": lambda x: 0.5 * x - 1}
    return {
        name: torch.from_numpy(transform.get(name, lambda x: x)(parity.fill_input(i["shape"], i["index"])))
        for name, i in GOLDEN["inputs"].items()
    }


@pytest.mark.parametrize("tap", GOLDEN["outputs"])
def test_official_scan_and_its_gradients_are_reproduced(implementation, tap):
    draws = golden_inputs()
    inputs = {k: draws[k] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")}
    name, window, *variant = tap.replace("delta_bias", "delta-bias").split("_")
    if "z" in variant:
        inputs["z"] = draws["z"]
    if "grouped" in variant:
        inputs |= {"B": draws["B_grouped"], "C": draws["C_grouped"]}
    for mode in (implementation, use_reference):
        with mode():
            leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
            y = local_bidirectional_scan(**leaves, delta_softplus=True, window=int(window.removeprefix("window")))
            if name == "y":
                got = y.detach()
            else:
                (got,) = torch.autograd.grad(y, leaves[name[1:].replace("-", "_")], draws["dy"])
        assert parity.relative_error(got, GOLDEN["outputs"][tap]) < 1e-5, tap


def test_windows_follow_the_official_table_unless_given():
    assert [official_window(n) for n in (1, 128, 129, 256, 257, 4096)] == [4, 4, 8, 8, 16, 16]
    for length, window in ((100, 4), (200, 8), (300, 16)):
        inputs = scan_inputs(1, 3, length, 2, 1)
        got, want = (local_bidirectional_scan(**inputs, delta_softplus=True, window=w) for w in (None, window))
        assert torch.equal(got, want)


def test_a_window_of_one_step_is_the_selective_scan(implementation):
    inputs = scan_inputs(2, 20, 83, 4, 2)
    with implementation():
        got = local_bidirectional_scan(**inputs, delta_softplus=True, window=1)
        assert torch.equal(got, selective_scan(**inputs, delta_softplus=True))


def test_a_step_sees_the_rest_of_its_window_and_nothing_after_it(implementation):
    inputs = scan_inputs(1, 3, 24, 4, 1)
    changed = inputs | {"u": inputs["u"].clone()}
    changed["u"][..., 13] += 1
    with implementation():
        before, after = (local_bidirectional_scan(**x, delta_softplus=True, window=8) for x in (inputs, changed))
    assert torch.equal(before[..., :8], after[..., :8])
    assert not torch.isclose(before[..., 8:14], after[..., 8:14]).any()


def test_a_window_beyond_the_sequence_is_one_window(implementation):
    inputs = scan_inputs(1, 6, 40, 4, 1)
    with implementation():
        whole = output_and_gradients(inputs, 40)
        for name, tensor in output_and_gradients(inputs, 10**9).items():
            assert torch.equal(tensor, whole[name]), name


def test_strong_decay_and_long_memory_stay_exact(implementation):
    inputs = scan_inputs(1, 4, 400, 3, 1)
    inputs["A"] = torch.tensor([-80.0, -1e-4, -1.0]).expand(4, 3).contiguous()
    check_against_definition(implementation, inputs, 16)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_non_contiguous_inputs_give_the_same_numbers(implementation, layout):
    change = {
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
        "expanded": lambda x: x[:1].expand(x.shape),
        "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    }[layout]
    changed = {name: change(tensor) for name, tensor in scan_inputs(2, 8, 36, 3, 2).items()}
    assert not all(t.is_contiguous() for t in changed.values())
    plain = {name: tensor.contiguous() for name, tensor in changed.items()}
    with implementation():
        got, want = output_and_gradients(changed, 8), output_and_gradients(plain, 8)
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(implementation):
    with implementation():
        got = output_and_gradients(scan_inputs(0, 6, 9, 4, 2), 4)
    assert got["out"].shape == (0, 6, 9)
    for name in ("dA", "dD", "ddelta_bias"):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_an_item_does_not_depend_on_its_batch(implementation):
    inputs = scan_inputs(3, 20, 77, 4, 2)
    per_item = {k: v[1:2] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    with implementation():
        whole, alone = (local_bidirectional_scan(**x, delta_softplus=True) for x in (inputs, per_item))
    assert relative_rms(alone, whole[1:2]) < 1e-6


def test_results_do_not_depend_on_the_number_of_threads(native_cpu):
    inputs, before = scan_inputs(2, 40, 83, 16, 1), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = output_and_gradients(inputs, 8)
        torch.set_num_threads(3)
        got = output_and_gradients(inputs, 8)
    finally:
        torch.set_num_threads(before)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_at_length_262144_for_extreme_steps_and_decays(implementation, dtype):
    inputs = scan_inputs(1, 2, 262_144, 4, 1, dtype=dtype, absent=("delta_bias",))
    inputs |= {"delta": extreme_steps((1, 2, 262_144), 2, dtype), "A": torch.tensor(DECAYS).expand(2, 4)}
    with implementation():
        got = output_and_gradients(inputs, None, softplus=False)
        wide = output_and_gradients(inputs, None, softplus=False, dtype=torch.float32)
    for name, tensor in got.items():
        assert_finite_where_it_fits(tensor, wide[name], name)


def test_autocast_computes_and_returns_float32(implementation):
    inputs = scan_inputs(1, 8, 50, 4, 1)
    half = {k: v.to(torch.bfloat16) if k in ("u", "B", "C") else v for k, v in inputs.items()}
    for t in half.values():
        t.requires_grad_()
    with implementation(), torch.autocast("cpu", torch.bfloat16):
        out = local_bidirectional_scan(**half, delta_softplus=True)
        assert out.dtype == torch.float32
        out.sum().backward()
    assert half["u"].grad.dtype == torch.bfloat16 and half["A"].grad.dtype == torch.float32
    with use_reference():
        want = local_bidirectional_scan(**{k: v.detach().double() for k, v in half.items()}, delta_softplus=True)
    assert relative_rms(out, want) < 1e-5


@pytest.mark.parametrize("window", [4, 7, 40])
def test_gradcheck_in_float64(window):
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 4, 11, 2, 2, dtype=torch.float64).items()}

    def scan(*tensors):
        return local_bidirectional_scan(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True, window=window)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_definition_has_the_gradients_of_its_formula():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 2, 6, 2, 1, dtype=torch.float64).items()}
    with use_reference():
        assert torch.autograd.gradcheck(
            lambda *t: local_bidirectional_scan(**dict(zip(inputs, t, strict=True)), delta_softplus=True),
            tuple(inputs.values()),
        )


@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["all", "none"])
def test_opcheck(absent):
    inputs = scan_inputs(2, 6, 20, 3, 2, absent=absent)
    tensors = [inputs.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(forward_op, (*leaves, True, 8))
    out, chunk_states = forward_op(*tensors, True, 8)
    torch.library.opcheck(backward_op, (torch.randn_like(out), *tensors, chunk_states, True, 8))


def test_compiles_without_graph_breaks():
    inputs = scan_inputs(1, 4, 20, 2, 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scan(**tensors):
        return local_bidirectional_scan(**tensors, delta_softplus=True) * 2

    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    out = scan(**leaves)
    out.sum().backward()
    assert torch.equal(out.detach(), 2 * local_bidirectional_scan(**inputs, delta_softplus=True))
    assert all(torch.isfinite(t.grad).all() for t in leaves.values())


def test_second_derivative_is_refused_with_a_clear_error():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 2, 5, 2, 1).items()}
    out = local_bidirectional_scan(**inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"vssm.local_bidirectional_scan_backward.*no autograd formula"):
        grad.sum().backward()


def test_only_chunk_states_are_kept_for_the_backward_pass():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 4, 4096, 16, 1).items()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        local_bidirectional_scan(**inputs, delta_softplus=True)
    of_inputs = sum(t.numel() for t in inputs.values())
    assert sum(saved.values()) - of_inputs <= 4 * windowed_num_chunks(4096, 16) * 16


@pytest.mark.parametrize("length,window", [(1, 4), (37, 7), (300, 100), (3136, 16), (5000, 5000)])
def test_chunks_hold_whole_windows_and_cover_the_sequence(length, window):
    steps = windowed_chunk_length(length, window)
    assert steps % window == 0
    assert 0 <= steps * windowed_num_chunks(length, window) - length < steps


@pytest.mark.parametrize("window", [3, 32])
def test_windows_the_kernels_do_not_take_run_portable(native_cpu, monkeypatch, window):
    inputs = scan_inputs(1, 4, 50, 2, 1)
    with use_portable():
        want = output_and_gradients(inputs, window)
    monkeypatch.setattr(native, "library", None)  # any native call would fail
    for name, tensor in output_and_gradients(inputs, window).items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize(
    "change,words",
    [
        ({"u": torch.zeros(3, 9)}, ("u has shape (3, 9)", "(batch, channels, length)")),
        ({"B": torch.zeros(2, 4, 3, 9)}, ("B has shape (2, 4, 3, 9)", "groups dividing the 6 channels")),
        ({"delta_bias": torch.zeros(6, 1)}, ("delta_bias has shape (6, 1)", "(6,)")),
        ({"z": torch.zeros(2, 6, 9).half()}, ("z is float16", "float32")),
        ({"window": 0}, ("window is 0", "at least 1")),
        ({"window": 2.5}, ("window is 2.5", "whole number")),
        ({"window": True}, ("window is True", "whole number")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_with_what_came_and_what_is_needed(change, words):
    with pytest.raises(ValueError, match="local_bidirectional_scan: ") as error:
        local_bidirectional_scan(**(scan_inputs(2, 6, 9, 3, 2) | change))
    for word in words:
        assert word in str(error.value)
