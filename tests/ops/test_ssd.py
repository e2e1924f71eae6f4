"""Every implementation of Mamba-2's scan against its float64 definition, forward and every gradient."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
from extremes import DECAYS, extreme_steps
from tolerances import assert_close, assert_finite_where_it_fits, relative_rms

from vssm.ops import native, ssd, use_portable, use_reference
from vssm.ops.ssd.op import backward_op, forward_op

GOLDEN = parity.load(Path(__file__).parents[1] / "golden" / "ssd.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("D", "z", "dt_bias", "initial_states")
PARAMETERS = ("A", "D", "dt_bias", "initial_states")
SHAPES = [  # batch, length, heads, channels of a head, groups, states
    (2, 37, 6, 5, 2, 3),
    (1, 1, 4, 2, 1, 2),
    (3, 2, 1, 1, 1, 1),
    (2, 63, 4, 24, 4, 16),
    (1, 130, 3, 33, 1, 64),
    (2, 257, 2, 4, 1, 5),
    (1, 1000, 2, 16, 2, 16),
    (1, 70, 2, 3, 1, 256),
]


def ssd_inputs(batch, length, heads, width, groups, states, dtype=torch.float32, absent=(), wide_D=False):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0, shift=0.0):
        return scale * torch.randn(*shape, generator=rng, dtype=torch.float64) + shift

    inputs = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads, shift=-1.0),
        "A": -torch.exp(normal(heads, scale=0.5)),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads, width) if wide_D else normal(heads),
        "z": normal(batch, length, heads, width),
        "dt_bias": normal(heads, scale=0.5),
        "initial_states": normal(batch, heads, width, states),
    }
    for name, tensor in inputs.items():
        inputs[name] = tensor.to(torch.float32 if name in PARAMETERS and dtype != torch.float64 else dtype)
    return {name: tensor for name, tensor in inputs.items() if name not in absent}


def outputs_and_gradients(inputs, dtype=None, **settings):
    """{name: tensor} of out, final_states and the gradient of every input, for a fixed random cotangent."""
    settings = {"dt_softplus": True} | settings
    inputs = {k: (v if dtype is None else v.to(dtype)).detach().clone().requires_grad_() for k, v in inputs.items()}
    outputs = ssd(**inputs, **settings, return_final_states=True)
    rng = torch.Generator().manual_seed(1)
    # Eighths are exact in every dtype, so that rounding the cotangent is no part of the error.
    cotangents = [torch.randn(t.shape, generator=rng).mul(8).round().div(8).double() for t in outputs]
    loss = sum((t.double() * w).sum() for t, w in zip(outputs, cotangents, strict=True))
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = dict(zip(("out", "final_states"), outputs, strict=True))
    return results | {f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}


@pytest.fixture(params=["portable", "native"])
def implementation(request):
    """A context inside which the implementation of that name serves CPU tensors."""
    if request.param == "portable":
        return use_portable
    request.getfixturevalue("native_cpu")
    return contextlib.nullcontext


def check_against_definition(implementation, inputs, **settings):
    with use_reference():
        want = outputs_and_gradients(inputs, torch.float64, **settings)
    with implementation():
        got = outputs_and_gradients(inputs, **settings)
    for name, tensor in got.items():
        assert_close(tensor, want[name], tensor.dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_agree_with_the_definition(implementation, poisoned_memory, shape, dtype):
    check_against_definition(implementation, ssd_inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("absent", [("D",), ("z",), ("dt_bias",), ("initial_states",), OPTIONAL], ids="-".join)
@pytest.mark.parametrize("softplus", [True, False])
def test_optional_inputs_can_be_left_out(implementation, absent, softplus):
    inputs = ssd_inputs(2, 45, 6, 7, 2, 4, absent=absent)
    if not softplus:
        inputs["dt"] = inputs["dt"].abs()
    check_against_definition(implementation, inputs, dt_softplus=softplus)


def test_skip_weights_can_be_one_per_channel(implementation):
    check_against_definition(implementation, ssd_inputs(2, 40, 4, 6, 2, 4, wide_D=True))


def test_step_sizes_can_be_wider_than_the_sequences(implementation):
    inputs = ssd_inputs(2, 40, 4, 6, 2, 4, dtype=torch.bfloat16)
    check_against_definition(implementation, inputs | {"dt": inputs["dt"].float()})


def test_limits_cut_step_sizes_and_their_gradients(implementation):
    inputs = ssd_inputs(1, 50, 4, 6, 2, 4)
    check_against_definition(implementation, inputs, dt_limit=(0.2, 0.6))
    with implementation():
        inside = outputs_and_gradients(inputs, dt_limit=(0.2, 0.6))["ddt"] != 0
    sizes = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"])
    assert torch.equal(inside, (sizes > 0.2) & (sizes < 0.6))


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 1000])
def test_the_chunk_size_changes_nothing(chunk_size):
    with use_portable():
        check_against_definition(contextlib.nullcontext, ssd_inputs(2, 100, 4, 6, 2, 5), chunk_size=chunk_size)


def test_official_scan_is_reproduced(implementation):
    functions = {
        "id": lambda x: x,
        "neg_exp": lambda x: -np.exp(x),
        "neg_softplus": lambda x: -np.log1p(np.exp(x)),
    }
    for case in GOLDEN["cases"]:
        inputs = {}
        for i in case["inputs"]:
            raw = np.float32(i["scale"]) * parity.fill_input(i["shape"], i["index"]) + np.float32(i["shift"])
            inputs[i["arg"]] = torch.from_numpy(functions[i["fn"]](raw).astype(np.float32))
        settings = dict(case["kwargs"], chunk_size=8)
        if "X" in inputs:
            # The minimal version takes dt * x and dt * A.
            del settings["block_len"]
            dt = -inputs["A"]
            inputs |= {"x": inputs.pop("X") / dt[..., None], "dt": dt, "A": torch.full(dt.shape[2:], -1.0)}
            if "initial_states" in inputs:
                inputs["initial_states"] = inputs["initial_states"][:, 0]
        for mode in (implementation, use_reference):
            with mode():
                result = ssd(**inputs, **settings, return_final_states=True)
            for tensor, (tap, want) in zip(result, case["outputs"].items(), strict=False):
                assert parity.relative_error(tensor, want) < 1e-5, (case["case"], tap)


def test_strong_decay_and_long_memory_stay_exact(implementation):
    inputs = ssd_inputs(1, 400, 3, 4, 1, 3)
    inputs["A"] = torch.tensor([-80.0, -1e-4, -1.0])
    check_against_definition(implementation, inputs)


def test_short_memory_after_a_huge_step_stays_exact(implementation):
    inputs = ssd_inputs(1, 64, 2, 4, 1, 3, absent=("dt_bias",))
    inputs["dt"] = torch.where(torch.arange(64)[:, None] % 9 == 3, 5e4, 0.01).expand(1, 64, 2).contiguous()
    inputs["A"] = torch.tensor([-1.0, -20.0])
    inputs["x"] = torch.where(inputs["dt"][..., None] > 1, 0, inputs["x"])
    check_against_definition(implementation, inputs, dt_softplus=False)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_non_contiguous_inputs_give_the_same_numbers(implementation, layout):
    change = {
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
        "expanded": lambda x: x[:1].expand(x.shape),
        "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    }[layout]
    changed = {name: change(tensor) for name, tensor in ssd_inputs(2, 36, 4, 6, 2, 3).items()}
    assert not all(t.is_contiguous() for t in changed.values())
    plain = {name: tensor.contiguous() for name, tensor in changed.items()}
    with implementation():
        got, want = outputs_and_gradients(changed), outputs_and_gradients(plain)
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(implementation):
    with implementation():
        got = outputs_and_gradients(ssd_inputs(0, 9, 4, 6, 2, 3))
    assert got["out"].shape == (0, 9, 4, 6) and got["final_states"].shape == (0, 4, 6, 3)
    for name in ("dA", "dD", "ddt_bias"):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_an_item_does_not_depend_on_its_batch(implementation):
    inputs = ssd_inputs(3, 77, 4, 20, 2, 4)
    per_item = {k: v if k in ("A", "D", "dt_bias") else v[1:2] for k, v in inputs.items()}
    with implementation():
        whole, alone = (ssd(**i, dt_softplus=True) for i in (inputs, per_item))
    assert relative_rms(alone, whole[1:2]) < 1e-6


def test_results_do_not_depend_on_the_number_of_threads(native_cpu):
    inputs, before = ssd_inputs(2, 83, 6, 20, 2, 16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = outputs_and_gradients(inputs)
        torch.set_num_threads(3)
        got = outputs_and_gradients(inputs)
    finally:
        torch.set_num_threads(before)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_at_length_262144_for_extreme_steps_and_decays(implementation, dtype):
    inputs = ssd_inputs(1, 262_144, 4, 2, 1, 4, dtype=dtype, absent=("dt_bias",))
    inputs |= {"dt": extreme_steps((1, 262_144, 4), 1, dtype), "A": torch.tensor(DECAYS)}
    with implementation():
        got = outputs_and_gradients(inputs, dt_softplus=False)
        wide = outputs_and_gradients(inputs, torch.float32, dt_softplus=False)
    for name, tensor in got.items():
        assert_finite_where_it_fits(tensor, wide[name], name)


def test_autocast_computes_and_returns_float32(implementation):
    inputs = ssd_inputs(1, 50, 4, 6, 1, 4)
    half = {k: v.to(torch.bfloat16) if k in ("x", "B", "C") else v for k, v in inputs.items()}
    for t in half.values():
        t.requires_grad_()
    with implementation(), torch.autocast("cpu", torch.bfloat16):
        out = ssd(**half, dt_softplus=True)
        assert out.dtype == torch.float32
        out.sum().backward()
    assert half["x"].grad.dtype == torch.bfloat16 and half["A"].grad.dtype == torch.float32
    with use_reference():
        want = ssd(**{k: v.detach().double() for k, v in half.items()}, dt_softplus=True)
    assert relative_rms(out, want) < 1e-5


@pytest.mark.parametrize("wide_D", [False, True])
def test_gradcheck_in_float64(wide_D):
    inputs = ssd_inputs(1, 11, 4, 3, 2, 2, dtype=torch.float64, wide_D=wide_D)
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}

    def scan(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        return ssd(**arguments, chunk_size=4, dt_softplus=True, return_final_states=True, dt_limit=(0.05, 1.0))

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_definition_has_the_gradients_of_its_formula():
    inputs = {k: v.requires_grad_() for k, v in ssd_inputs(1, 5, 2, 2, 1, 2, dtype=torch.float64).items()}
    with use_reference():
        assert torch.autograd.gradcheck(
            lambda *t: ssd(**dict(zip(inputs, t, strict=True)), dt_softplus=True), tuple(inputs.values())
        )


@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["all", "none"])
def test_opcheck(absent):
    inputs = ssd_inputs(2, 20, 4, 3, 2, 3, absent=absent)
    tensors = [inputs.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")]
    settings = True, 0.0, math.inf, 8
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(forward_op, (*leaves, *settings))
    out, final_states = forward_op(*tensors, *settings)
    torch.library.opcheck(backward_op, (torch.randn_like(out), torch.randn_like(final_states), *tensors, *settings))


def test_compiles_without_graph_breaks():
    inputs = ssd_inputs(1, 20, 4, 3, 1, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scan(**tensors):
        return ssd(**tensors, dt_softplus=True) * 2

    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    out = scan(**leaves)
    out.sum().backward()
    assert torch.equal(out.detach(), 2 * ssd(**inputs, dt_softplus=True))
    assert all(torch.isfinite(t.grad).all() for t in leaves.values())


def test_second_derivative_is_refused_with_a_clear_error():
    inputs = {k: v.requires_grad_() for k, v in ssd_inputs(1, 5, 2, 2, 1, 2).items()}
    (grad,) = torch.autograd.grad(ssd(**inputs).square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"vssm.ssd_backward.*no autograd formula"):
        grad.sum().backward()


def test_only_the_inputs_are_kept_for_the_backward_pass():
    inputs = {k: v.requires_grad_() for k, v in ssd_inputs(1, 4096, 2, 4, 1, 16).items()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ssd(**inputs, dt_softplus=True)
    assert sum(saved.values()) == sum(t.numel() for t in inputs.values())


def test_many_states_walk_back_portable(native_cpu, monkeypatch):
    inputs = {k: v.requires_grad_() for k, v in ssd_inputs(1, 20, 2, 3, 1, 65).items()}
    with use_portable():
        want = torch.autograd.grad(ssd(**inputs, dt_softplus=True).sum(), inputs["x"])[0]
    out = ssd(**inputs, dt_softplus=True)
    monkeypatch.setattr(native, "library", None)  # any native call would fail
    assert torch.equal(torch.autograd.grad(out.sum(), inputs["x"])[0], want)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"x": torch.zeros(3, 9, 2)}, ("x has shape (3, 9, 2)", "(batch, length, heads, channels of a head)")),
        ({"x": torch.zeros(2, 9, 4, 3).long()}, ("x is int64", "float32")),
        ({"dt": torch.zeros(2, 9)}, ("dt has shape (2, 9)", "(2, 9, 4)")),
        ({"dt": torch.zeros(2, 9, 4).half()}, ("dt is float16", "float32")),
        ({"A": torch.zeros(4, 2)}, ("A has shape (4, 2)", "(heads,)")),
        ({"A": torch.zeros(4).half()}, ("A is float16", "float32")),
        ({"B": torch.zeros(2, 9, 3, 5)}, ("B has shape (2, 9, 3, 5)", "groups dividing the 4 heads")),
        ({"C": torch.zeros(2, 9, 1, 5)}, ("C has shape (2, 9, 1, 5)", "the shape of B")),
        ({"D": torch.zeros(3)}, ("D has shape (3,)", "(4,)", "(4, 3)")),
        ({"z": torch.zeros(1, 9, 4, 3)}, ("z has shape (1, 9, 4, 3)", "shape of x")),
        ({"dt_bias": [0.0]}, ("dt_bias is list", "torch.Tensor")),
        ({"initial_states": torch.zeros(2, 4, 5, 3)}, ("initial_states has shape (2, 4, 5, 3)", "(2, 4, 3, 5)")),
        ({"initial_states": torch.zeros(2, 4, 3, 5, device="meta")}, ("initial_states is on meta", "cpu")),
        ({"chunk_size": 0}, ("chunk_size is 0", "at least 1")),
        ({"dt_limit": (1.0, 0.5)}, ("dt_limit is (1.0, 0.5)", "(smallest, largest)")),
        ({"dt_limit": 3.0}, ("dt_limit is 3.0", "(smallest, largest)")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_with_what_came_and_what_is_needed(change, words):
    with pytest.raises(ValueError, match="ssd: ") as error:
        ssd(**(ssd_inputs(2, 9, 4, 3, 2, 5) | change))
    for word in words:
        assert word in str(error.value)
