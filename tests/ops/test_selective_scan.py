"""Every implementation of the selective scan against its float64 definition, forward and every gradient."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
from extremes import DECAYS, extreme_steps
from tolerances import assert_close, assert_finite_where_it_fits, relative_rms

from vssm.ops import selective_scan, use_portable, use_reference
from vssm.ops.selective_scan.chunks import chunk_length, num_chunks
from vssm.ops.selective_scan.op import backward_op, forward_op

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("D", "z", "delta_bias")
SHAPES = [  # batch, channels, length, states, groups
    (2, 6, 37, 3, 2),
    (1, 4, 1, 2, 1),
    (3, 1, 2, 1, 1),
    (2, 24, 63, 16, 4),
    (1, 70, 130, 1, 2),
    (2, 33, 257, 5, 1),
    (1, 16, 1000, 16, 1),
    (1, 3, 20, 256, 1),
]


def scan_inputs(batch, channels, length, states, groups, dtype=torch.float32, absent=(), seed=0):
    """Inputs of usual size; float64 copies of rounded values, so that an error is the implementation's alone."""
    rng = torch.Generator().manual_seed(seed)

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


def outputs_and_gradients(inputs, softplus=True, dtype=None):
    """{name: tensor} of out, last_state and the gradient of every input, for a fixed random cotangent."""
    inputs = {k: (v if dtype is None else v.to(dtype)).detach().clone().requires_grad_() for k, v in inputs.items()}
    out, last_state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True)
    rng = torch.Generator().manual_seed(1)
    # Eighths are exact in every dtype, so that rounding the cotangent is no part of the error.
    cotangents = [torch.randn(t.shape, generator=rng).mul(8).round().div(8).double() for t in (out, last_state)]
    loss = sum((t.double() * w).sum() for t, w in zip((out, last_state), cotangents, strict=True))
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = {"out": out, "last_state": last_state}
    return results | {f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}


def definition(inputs, softplus=True):
    with use_reference():
        return outputs_and_gradients(inputs, softplus, torch.float64)


@pytest.fixture(params=["portable", "native"])
def implementation(request):
    """A context inside which the implementation of that name serves CPU tensors."""
    if request.param == "portable":
        return use_portable
    request.getfixturevalue("native_cpu")
    return contextlib.nullcontext


def check_against_definition(implementation, inputs, dtype, softplus=True):
    want = definition(inputs, softplus)
    with implementation():
        got = outputs_and_gradients(inputs, softplus)
    for name, tensor in got.items():
        # Sums over a batch and a length, and states, are float32 numbers whatever the inputs are.
        assert_close(tensor, want[name], tensor.dtype if name != "out" else dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_agree_with_the_definition(implementation, poisoned_memory, shape, dtype):
    check_against_definition(implementation, scan_inputs(*shape, dtype=dtype), dtype)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), OPTIONAL], ids="-".join)
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("states", [1, 4])
def test_optional_inputs_can_be_left_out(implementation, states, absent, softplus):
    inputs = scan_inputs(2, 20, 45, states, 2, absent=absent)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
    check_against_definition(implementation, inputs, torch.float32, softplus)


@pytest.mark.parametrize("file_case", range(8))
def test_official_selective_scan_is_reproduced(implementation, file_case):
    case = parity.load(GOLDEN / "selective_scan.json")["cases"][file_case]
    functions = {
        "id": lambda x: x,
        "exp": np.exp,
        "neg_exp": lambda x: -np.exp(x),
        "softplus": lambda x: np.log1p(np.exp(x)),
    }
    inputs = {}
    for i in case["inputs"]:
        raw = np.float32(i["scale"]) * parity.fill_input(i["shape"], i["index"]) + np.float32(i["shift"])
        inputs[i["arg"]] = torch.from_numpy(functions[i["fn"]](raw).astype(np.float32))
    for mode in (implementation, use_reference):
        with mode():
            result = selective_scan(**inputs, **case["kwargs"])
        result = result if isinstance(result, tuple) else (result,)
        for tensor, (tap, want) in zip(result, case["outputs"].items(), strict=True):
            assert parity.relative_error(tensor, want) < 1e-5, (case["case"], tap)


@pytest.mark.parametrize("length", [*range(1, 18), 127, 128, 129])
def test_one_state_is_scanned_to_the_end_of_every_length(implementation, length):
    check_against_definition(implementation, scan_inputs(1, 1 + length % 6, length, 1, 1), torch.float32)


def test_strong_decay_and_long_memory_stay_exact(implementation):
    inputs = scan_inputs(1, 4, 400, 3, 1)
    inputs["A"] = torch.tensor([-80.0, -1e-4, -1.0]).expand(4, 3).contiguous()
    check_against_definition(implementation, inputs, torch.float32)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded", "sliced"])
def test_non_contiguous_inputs_give_the_same_numbers(implementation, layout):
    inputs = scan_inputs(2, 8, 36, 3, 2)
    change = {
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
        "channels_last": lambda x: (
            x.unsqueeze(-1).contiguous(memory_format=torch.channels_last).squeeze(-1) if x.ndim == 3 else x
        ),
        "expanded": lambda x: x[:1].expand(x.shape),
        "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    }[layout]
    changed = {name: change(tensor) for name, tensor in inputs.items()}
    assert not all(t.is_contiguous() for t in changed.values())
    plain = {name: tensor.contiguous() for name, tensor in changed.items()}
    with implementation():
        got, want = outputs_and_gradients(changed), outputs_and_gradients(plain)
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(implementation):
    with implementation():
        got = outputs_and_gradients(scan_inputs(0, 6, 9, 4, 2))
    assert got["out"].shape == (0, 6, 9) and got["last_state"].shape == (0, 6, 4)
    for name in ("dA", "dD", "ddelta_bias"):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_an_item_does_not_depend_on_its_batch(implementation):
    inputs = scan_inputs(3, 20, 77, 4, 2)
    per_item = {k: v[1:2] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    with implementation():
        whole = selective_scan(**inputs, delta_softplus=True)
        alone = selective_scan(**per_item, delta_softplus=True)
    assert relative_rms(alone, whole[1:2]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_at_length_262144(implementation, dtype):
    inputs = scan_inputs(1, 2, 262_144, 4, 1, dtype=dtype)
    with implementation():
        got = outputs_and_gradients(inputs)
    for name, tensor in got.items():
        # The gradients of D, A and the bias sum 262,144 terms in float32 and are finite as well.
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_at_length_262144_for_extreme_steps_and_decays(implementation, dtype):
    inputs = scan_inputs(1, 2, 262_144, 4, 1, dtype=dtype, absent=("delta_bias",))
    inputs |= {"delta": extreme_steps((1, 2, 262_144), 2, dtype), "A": torch.tensor(DECAYS).expand(2, 4)}
    with implementation():
        got = outputs_and_gradients(inputs, softplus=False)
        wide = outputs_and_gradients(inputs, softplus=False, dtype=torch.float32)
    for name, tensor in got.items():
        assert_finite_where_it_fits(tensor, wide[name], name)


def test_autocast_computes_and_returns_float32(implementation):
    inputs = scan_inputs(1, 8, 50, 4, 1)
    half = {k: v.to(torch.bfloat16) if k in ("u", "B", "C") else v for k, v in inputs.items()}
    for t in half.values():
        t.requires_grad_()
    with implementation(), torch.autocast("cpu", torch.bfloat16):
        out = selective_scan(**half, delta_softplus=True)
        assert out.dtype == torch.float32
        out.sum().backward()
    assert half["u"].grad.dtype == torch.bfloat16 and half["A"].grad.dtype == torch.float32
    want = definition({k: v.detach() for k, v in half.items()})
    assert relative_rms(out, want["out"]) < 1e-5


def test_gradcheck_in_float64():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(2, 4, 19, 3, 2, dtype=torch.float64).items()}

    def scan(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_definition_has_the_gradients_of_its_formula():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 2, 6, 2, 1, dtype=torch.float64).items()}
    with use_reference():
        assert torch.autograd.gradcheck(
            lambda *t: selective_scan(**dict(zip(inputs, t, strict=True)), delta_softplus=True), tuple(inputs.values())
        )


@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["all", "none"])
def test_opcheck(absent):
    inputs = scan_inputs(2, 6, 20, 3, 2, absent=absent)
    tensors = [inputs.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(forward_op, (*leaves, True))
    out, last_state, chunk_states = forward_op(*tensors, True)
    arguments = (torch.randn_like(out), torch.randn_like(last_state), *tensors, chunk_states, True)
    torch.library.opcheck(backward_op, arguments)


def test_compiles_without_graph_breaks():
    inputs = scan_inputs(1, 4, 20, 2, 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scan(**tensors):
        return selective_scan(**tensors, delta_softplus=True) * 2

    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    out = scan(**leaves)
    out.sum().backward()
    assert torch.equal(out.detach(), 2 * selective_scan(**inputs, delta_softplus=True))
    assert all(torch.isfinite(t.grad).all() for t in leaves.values())


def test_second_derivative_is_refused_with_a_clear_error():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 2, 5, 2, 1).items()}
    (grad,) = torch.autograd.grad(selective_scan(**inputs).square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"vssm.selective_scan_backward.*no autograd formula"):
        grad.sum().backward()


def test_only_chunk_states_are_kept_for_the_backward_pass():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(1, 4, 4096, 16, 1).items()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(**inputs, delta_softplus=True)
    of_inputs = sum(t.numel() for t in inputs.values())
    assert sum(saved.values()) - of_inputs <= 4 * num_chunks(4096) * 16


@pytest.mark.parametrize("length", [1, 15, 16, 17, 256, 257, 3136, 262_144])
def test_chunks_cover_the_sequence_with_about_its_square_root_of_steps(length):
    steps = chunk_length(length)
    assert 0 <= steps * num_chunks(length) - length < steps
    assert steps == 16 or steps * steps >= length > (steps // 2) ** 2


def bad(name, change, *words):
    return pytest.param(name, change, words, id=f"{name}-{'-'.join(words)}".replace(" ", "_"))


@pytest.mark.parametrize(
    "name,change,words",
    [
        bad("u", lambda x: x[0], "(batch, channels, length)"),
        bad("u", lambda x: x[:, :, :0], "at least one"),
        bad("u", lambda x: x.long(), "int64", "float32"),
        bad("u", lambda x: None, "NoneType", "torch.Tensor"),
        bad("delta", lambda x: x[..., :-1], "(2, 6, 8)", "(2, 6, 9)"),
        bad("delta", lambda x: x.half(), "float16", "float32"),
        bad("A", lambda x: x[:-1], "(5, 3)", "6 channels"),
        bad("A", lambda x: x.to(torch.complex64), "complex64", "float32"),
        bad("A", lambda x: x.half(), "float16", "float32"),
        bad("B", lambda x: x[:, :1].expand(2, 4, 3, 9), "(2, 4, 3, 9)", "groups dividing the 6 channels"),
        bad("B", lambda x: x[:, :, :2], "(2, 2, 2, 9)"),
        bad("C", lambda x: x[..., :4], "(2, 2, 3, 4)"),
        bad("C", lambda x: x.double(), "float64", "float32"),
        bad("D", lambda x: x[:2], "(2,)", "(6,)"),
        bad("z", lambda x: x[:1], "(1, 6, 9)", "shape of u"),
        bad("delta_bias", lambda x: x[:, None], "(6, 1)", "(6,)"),
        bad("delta_bias", lambda x: x.bfloat16(), "bfloat16", "float32"),
        bad("z", lambda x: x.to("meta"), "meta", "cpu"),
    ],
)
def test_bad_arguments_are_named_with_what_came_and_what_is_needed(name, change, words):
    inputs = scan_inputs(2, 6, 9, 3, 2)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=rf"selective_scan: {name} ") as error:
        selective_scan(**inputs)
    for word in words:
        assert word in str(error.value)
