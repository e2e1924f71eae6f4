"""Every implementation of the causal convolution against its float64 definition, forward and every gradient."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tolerances import assert_close

from vssm.ops import causal_conv1d, use_portable, use_reference
from vssm.ops.causal_conv1d.op import backward_op, forward_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(2, 6, 37, 4), (1, 1, 1, 4), (2, 33, 2, 3), (1, 70, 129, 1), (1, 5, 1000, 7)]  # batch, channels, length, taps


def conv_inputs(batch, channels, length, taps, dtype=torch.float32, bias=True):
    rng = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(batch, channels, length, generator=rng).to(dtype),
        "weight": torch.randn(channels, taps, generator=rng),
    }
    return inputs | ({"bias": torch.randn(channels, generator=rng)} if bias else {})


def output_and_gradients(inputs, activation, dtype=None):
    inputs = {k: (v if dtype is None else v.to(dtype)).detach().clone().requires_grad_() for k, v in inputs.items()}
    out = causal_conv1d(**inputs, activation=activation)
    # Eighths are exact in every dtype, so that rounding the cotangent is no part of the error.
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).mul(8).round().div(8)
    gradients = torch.autograd.grad(out, list(inputs.values()), cotangent.to(out.dtype))
    return {"out": out} | {f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}


def check_against_definition(implementation, inputs, activation):
    with use_reference():
        want = output_and_gradients(inputs, activation, torch.float64)
    with implementation():
        got = output_and_gradients(inputs, activation)
    for name, tensor in got.items():
        assert_close(tensor, want[name], tensor.dtype, name)


@pytest.fixture(params=["portable", "native"])
def implementation(request):
    """A context inside which the implementation of that name serves CPU tensors."""
    if request.param == "portable":
        return use_portable
    request.getfixturevalue("native_cpu")
    return contextlib.nullcontext


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_agree_with_the_definition(implementation, poisoned_memory, shape, dtype, activation):
    check_against_definition(implementation, conv_inputs(*shape, dtype=dtype), activation)


def test_bias_can_be_left_out(implementation):
    check_against_definition(implementation, conv_inputs(2, 20, 45, 4, bias=False), "silu")


def test_output_never_looks_ahead(implementation):
    inputs = conv_inputs(1, 3, 20, 4)
    changed = inputs | {"x": inputs["x"].clone()}
    changed["x"][..., 12:] += 1
    with implementation():
        before, after = causal_conv1d(**inputs), causal_conv1d(**changed)
    assert torch.equal(before[..., :12], after[..., :12])
    assert not torch.isclose(before[..., 12:], after[..., 12:]).any()


def test_non_contiguous_input_gives_the_same_numbers(implementation):
    inputs = conv_inputs(2, 8, 31, 4)
    turned = inputs | {"x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    with implementation():
        assert torch.equal(causal_conv1d(**turned), causal_conv1d(**inputs))


def test_an_empty_batch_gives_empty_output_and_zero_gradients(implementation):
    with implementation():
        got = output_and_gradients(conv_inputs(0, 6, 9, 4), "silu")
    assert got["out"].shape == (0, 6, 9)
    assert torch.equal(got["dweight"], torch.zeros(6, 4)) and torch.equal(got["dbias"], torch.zeros(6))


def test_gradcheck_in_float64():
    inputs = [t.double().requires_grad_() for t in conv_inputs(2, 3, 7, 4).values()]
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, activation="silu"), inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    inputs = conv_inputs(2, 3, 9, 4, bias=bias)
    leaves = [inputs[k].clone().requires_grad_() if k in inputs else None for k in ("x", "weight", "bias")]
    torch.library.opcheck(forward_op, (*leaves, True))
    plain = [None if t is None else t.detach() for t in leaves]
    torch.library.opcheck(backward_op, (torch.randn(2, 3, 9), *plain, True))


def test_compiles_without_graph_breaks():
    inputs = conv_inputs(1, 4, 20, 4)
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, activation="silu"), causal_conv1d(**inputs, activation="silu"))


@pytest.mark.parametrize(
    "change,words",
    [
        ({"x": torch.zeros(3, 9)}, ("x has shape (3, 9)", "(batch, channels, length)")),
        ({"x": torch.zeros(2, 3, 9, dtype=torch.int32)}, ("x is int32", "float32")),
        ({"weight": torch.zeros(4, 4)}, ("weight has shape (4, 4)", "3 channels")),
        ({"weight": torch.zeros(3, 4).half()}, ("weight is float16", "float32")),
        ({"weight": torch.zeros(3, 4, device="meta")}, ("weight is on meta", "cpu")),
        ({"bias": torch.zeros(4)}, ("bias has shape (4,)", "(3,)")),
        ({"bias": [0.0]}, ("bias is list", "torch.Tensor")),
        ({"activation": "relu"}, ("activation is 'relu'", "'silu'")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_with_what_came_and_what_is_needed(change, words):
    with pytest.raises(ValueError) as error:
        causal_conv1d(**(conv_inputs(2, 3, 9, 4) | change))
    for word in words:
        assert word in str(error.value)
