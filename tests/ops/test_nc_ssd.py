"""The non-causal scan of VSSD against its float64 definition, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from extremes import extreme_steps
from tolerances import assert_close, assert_finite_where_it_fits, relative_rms

from vssm.ops import backends, nc_ssd, use_reference
from vssm.ops.nc_ssd.op import backward_op, forward_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("D", "dt_bias")
SHAPES = [  # batch, length, heads, channels of a head, groups, states
    (2, 37, 6, 5, 2, 3),
    (1, 1, 4, 2, 1, 2),
    (3, 2, 1, 1, 1, 1),
    (2, 63, 4, 24, 4, 16),
    (1, 257, 6, 32, 1, 64),
]


def nc_inputs(batch, length, heads, width, groups, states, dtype=torch.float32, absent=(), wide_D=False):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0, shift=0.0):
        return scale * torch.randn(*shape, generator=rng, dtype=torch.float64) + shift

    inputs = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads, shift=-1.0),
        "A": torch.exp(normal(heads, scale=0.5)),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads, width) if wide_D else normal(heads),
        "dt_bias": normal(heads, scale=0.5),
    }
    for name, tensor in inputs.items():
        parameter = name in ("A", "D", "dt_bias")
        inputs[name] = tensor.to(torch.float32 if parameter and dtype != torch.float64 else dtype)
    return {name: tensor for name, tensor in inputs.items() if name not in absent}


def output_and_gradients(inputs, softplus=True, dtype=None):
    """{name: tensor} of the output and the gradient of every input, for a fixed random cotangent."""
    inputs = {k: (v if dtype is None else v.to(dtype)).detach().clone().requires_grad_() for k, v in inputs.items()}
    out = nc_ssd(**inputs, dt_softplus=softplus)
    # Eighths are exact in every dtype, so that rounding the cotangent is no part of the error.
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).mul(8).round().div(8)
    gradients = torch.autograd.grad(out, list(inputs.values()), cotangent.to(out.dtype))
    return {"out": out} | {f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}


def check_against_definition(inputs, softplus=True):
    with use_reference():
        want = output_and_gradients(inputs, softplus, torch.float64)
    for name, tensor in output_and_gradients(inputs, softplus).items():
        assert_close(tensor, want[name], tensor.dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_agree_with_the_definition(poisoned_memory, shape, dtype):
    check_against_definition(nc_inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("absent", [("D",), ("dt_bias",), OPTIONAL], ids="-".join)
@pytest.mark.parametrize("softplus", [True, False])
def test_optional_inputs_can_be_left_out(absent, softplus):
    check_against_definition(nc_inputs(2, 45, 6, 7, 2, 4, absent=absent), softplus)


def test_skip_weights_can_be_one_per_channel():
    check_against_definition(nc_inputs(2, 40, 4, 6, 2, 4, wide_D=True))


def test_step_sizes_can_be_wider_than_the_sequences():
    inputs = nc_inputs(2, 40, 4, 6, 2, 4, dtype=torch.bfloat16)
    check_against_definition(inputs | {"dt": inputs["dt"].float()})


def test_groups_are_dealt_out_to_heads_in_turn():
    inputs = nc_inputs(1, 20, 6, 4, 2, 3)
    group_of_head = [0, 1, 0, 1, 0, 1]
    spread = {key: inputs[key][:, :, group_of_head] for key in ("B", "C")}
    assert relative_rms(nc_ssd(**inputs), nc_ssd(**(inputs | spread))) < 1e-6


def test_the_order_of_positions_does_not_matter():
    inputs = nc_inputs(1, 50, 4, 6, 1, 3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    shuffled = {k: v[:, order] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    assert relative_rms(nc_ssd(**shuffled), nc_ssd(**inputs)[:, order]) < 1e-6


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_non_contiguous_inputs_give_the_same_numbers(layout):
    change = {
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
        "expanded": lambda x: x[:1].expand(x.shape),
        "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    }[layout]
    changed = {name: change(tensor) for name, tensor in nc_inputs(2, 36, 4, 6, 2, 3).items()}
    assert not all(t.is_contiguous() for t in changed.values())
    plain = {name: tensor.contiguous() for name, tensor in changed.items()}
    got, want = output_and_gradients(changed), output_and_gradients(plain)
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_an_empty_batch_gives_empty_output_and_zero_gradients():
    got = output_and_gradients(nc_inputs(0, 9, 4, 6, 2, 3))
    assert got["out"].shape == (0, 9, 4, 6)
    for name in ("dA", "dD", "ddt_bias"):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_an_item_does_not_depend_on_its_batch():
    inputs = nc_inputs(3, 77, 4, 20, 2, 4)
    per_item = {k: v if k in ("A", "D", "dt_bias") else v[1:2] for k, v in inputs.items()}
    assert relative_rms(nc_ssd(**per_item), nc_ssd(**inputs)[1:2]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_at_length_262144_for_extreme_steps_and_weights(dtype):
    inputs = nc_inputs(1, 262_144, 4, 2, 1, 4, dtype=dtype, absent=("dt_bias",))
    inputs |= {"dt": extreme_steps((1, 262_144, 4), 1, dtype), "A": torch.tensor([1e-3, 1.0, -1.0, 1e3])}
    got = output_and_gradients(inputs, softplus=False)
    wide = output_and_gradients(inputs, softplus=False, dtype=torch.float32)
    for name, tensor in got.items():
        assert_finite_where_it_fits(tensor, wide[name], name)


def test_autocast_computes_and_returns_float32():
    inputs = nc_inputs(1, 50, 4, 6, 1, 4)
    half = {k: v.to(torch.bfloat16) if k in ("x", "B", "C") else v for k, v in inputs.items()}
    for t in half.values():
        t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = nc_ssd(**half, dt_softplus=True)
        assert out.dtype == torch.float32
        out.sum().backward()
    assert half["x"].grad.dtype == torch.bfloat16 and half["A"].grad.dtype == torch.float32
    with use_reference():
        want = nc_ssd(**{k: v.detach().double() for k, v in half.items()}, dt_softplus=True)
    assert relative_rms(out, want) < 1e-5


@pytest.mark.parametrize("wide_D", [False, True])
def test_gradcheck_in_float64(wide_D):
    inputs = nc_inputs(1, 7, 4, 3, 2, 2, dtype=torch.float64, wide_D=wide_D)
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    assert torch.autograd.gradcheck(
        lambda *t: nc_ssd(**dict(zip(inputs, t, strict=True)), dt_softplus=True), tuple(inputs.values())
    )


@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["all", "none"])
def test_opcheck(absent):
    inputs = nc_inputs(2, 20, 4, 3, 2, 3, absent=absent)
    tensors = [inputs.get(k) for k in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(forward_op, (*leaves, True))
    torch.library.opcheck(backward_op, (torch.randn(2, 20, 4, 3), *tensors, True))


def test_compiles_without_graph_breaks():
    inputs = nc_inputs(1, 20, 4, 3, 1, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scan(**tensors):
        return nc_ssd(**tensors, dt_softplus=True) * 2

    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    out = scan(**leaves)
    out.sum().backward()
    assert torch.equal(out.detach(), 2 * nc_ssd(**inputs, dt_softplus=True))
    assert all(torch.isfinite(t.grad).all() for t in leaves.values())


def test_second_derivative_is_refused_with_a_clear_error():
    inputs = {k: v.requires_grad_() for k, v in nc_inputs(1, 5, 2, 2, 1, 2).items()}
    (grad,) = torch.autograd.grad(nc_ssd(**inputs).square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"vssm.nc_ssd_backward.*no autograd formula"):
        grad.sum().backward()


def test_status_says_that_matrix_products_are_the_kernel():
    rows = [row for row in backends.status() if row.op == "nc_ssd"]
    assert rows and all(row.kernel == "portable" and "matrix products" in row.reason for row in rows)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"x": torch.zeros(3, 9, 2)}, ("x has shape (3, 9, 2)", "(batch, length, heads, channels of a head)")),
        ({"dt": torch.zeros(2, 9)}, ("dt has shape (2, 9)", "(2, 9, 4)")),
        ({"A": torch.zeros(4).half()}, ("A is float16", "float32")),
        ({"B": torch.zeros(2, 9, 3, 5)}, ("B has shape (2, 9, 3, 5)", "groups dividing the 4 heads")),
        ({"D": torch.zeros(3)}, ("D has shape (3,)", "(4,)", "(4, 3)")),
        ({"dt_bias": [0.0]}, ("dt_bias is list", "torch.Tensor")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_with_what_came_and_what_is_needed(change, words):
    with pytest.raises(ValueError, match="nc_ssd: ") as error:
        nc_ssd(**(nc_inputs(2, 9, 4, 3, 2, 5) | change))
    for word in words:
        assert word in str(error.value)
