"""Every implementation of the scan along routes against its float64 definition, forward and every gradient."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tolerances import assert_close, relative_rms

from vssm.layers.routes import CrossRoutes
from vssm.ops import cross_selective_scan, selective_scan, use_portable, use_reference
from vssm.ops.cross_selective_scan.op import backward_op, forward_op
from vssm.ops.selective_scan.chunks import num_chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("D", "delta_bias")
NAMES = ("x", "dt_b_c", "dt_weight", "A", "order", "D", "delta_bias")
# Batch, positions, channels, routes, steps, states, rank; more steps than positions need padding, fewer leave some out.
SHAPES = [
    (2, 36, 24, 4, 36, 1, 6),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 3, 2, 2, 4, 2),
    (2, 37, 70, 3, 50, 16, 5),
    (1, 20, 33, 2, 11, 3, 13),
    (1, 300, 16, 2, 300, 16, 1),
    (1, 70, 130, 4, 71, 1, 24),
    (1, 9, 8, 1, 9, 256, 3),
]


def random_table(positions, routes, steps, rng):
    """Routes in random order, with padding in random places where there are more steps than positions."""
    table = torch.full((routes, steps), -1, dtype=torch.int32)
    visits = min(positions, steps)
    for route in table:
        at = torch.randperm(steps, generator=rng)[:visits]
        route[at] = torch.randperm(positions, generator=rng)[:visits].int()
    return table


def cross_inputs(
    batch, positions, channels, routes, steps, states, rank, separate=False, dtype=torch.float32, absent=(), seed=0
):
    """Inputs of usual size; float64 copies of rounded values, so that an error is the implementation's alone."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, shift=0.0):
        return scale * torch.randn(*shape, generator=rng, dtype=torch.float64) + shift

    inputs = {
        "x": normal(batch, positions, *([routes] if separate else []), channels),
        "dt_b_c": normal(batch, positions, routes, rank + 2 * states),
        "dt_weight": normal(routes, channels, rank, scale=rank**-0.5),
        "A": -torch.exp(normal(routes, channels, states, scale=0.5)),
        "D": normal(routes, channels),
        "delta_bias": normal(routes, channels, scale=0.5, shift=-1.0),
    }
    for name, tensor in inputs.items():
        parameter = name in ("A", "D", "delta_bias")
        inputs[name] = tensor.to(torch.float32 if parameter and dtype != torch.float64 else dtype)
    inputs["order"] = random_table(positions, routes, steps, rng)
    return {name: inputs[name] for name in NAMES if name not in absent}


def output_and_gradients(inputs, softplus=True, dtype=None):
    """{name: tensor} of y and the gradient of every input but the table, for a fixed random cotangent."""
    order = inputs["order"]
    inputs = {name: tensor for name, tensor in inputs.items() if name != "order"}
    inputs = {k: (v if dtype is None else v.to(dtype)).detach().clone().requires_grad_() for k, v in inputs.items()}
    y = cross_selective_scan(**inputs, order=order, delta_softplus=softplus)
    # Eighths are exact in every dtype, so that rounding the cotangent is no part of the error.
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).mul(8).round().div(8)
    gradients = torch.autograd.grad(y, list(inputs.values()), cotangent.to(y.dtype))
    return {"y": y} | {f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}


@pytest.fixture(params=["portable", "native"])
def implementation(request):
    """A context inside which the implementation of that name serves CPU tensors."""
    if request.param == "portable":
        return use_portable
    request.getfixturevalue("native_cpu")
    return contextlib.nullcontext


def check_against_definition(implementation, inputs, softplus=True):
    with use_reference():
        want = output_and_gradients(inputs, softplus, torch.float64)
    with implementation():
        got = output_and_gradients(inputs, softplus)
    for name, tensor in got.items():
        assert_close(tensor, want[name], tensor.dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_agree_with_the_definition(implementation, poisoned_memory, shape, separate, dtype):
    check_against_definition(implementation, cross_inputs(*shape, separate=separate, dtype=dtype))


@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), OPTIONAL], ids="-".join)
@pytest.mark.parametrize("softplus", [True, False])
def test_optional_inputs_can_be_left_out(implementation, absent, softplus):
    inputs = cross_inputs(2, 20, 20, 3, 22, 4, 2, absent=absent)
    if not softplus:
        inputs["dt_b_c"][..., :2] = inputs["dt_b_c"][..., :2].abs()
        inputs["dt_weight"] = inputs["dt_weight"].abs()
    check_against_definition(implementation, inputs, softplus)


def test_half_precision_maps_take_float32_weights(implementation):
    inputs = cross_inputs(1, 20, 20, 2, 20, 1, 3, dtype=torch.bfloat16)
    inputs["dt_weight"] = inputs["dt_weight"].float()
    check_against_definition(implementation, inputs)


def test_strong_decay_and_long_memory_stay_exact(implementation):
    inputs = cross_inputs(1, 400, 4, 2, 400, 3, 2)
    inputs["A"] = torch.tensor([-80.0, -1e-4, -1.0]).expand(2, 4, 3).contiguous()
    check_against_definition(implementation, inputs)


@pytest.mark.parametrize("states", [1, 16])
def test_cross_scan_is_scatter_then_scan_then_gather(implementation, states):
    height, width, rank, routes = 7, 10, 4, CrossRoutes()
    order = torch.arange(height * width, dtype=torch.int32).view(1, 1, height, width)
    order = routes.scatter(order)[0, :, 0]
    inputs = cross_inputs(2, height * width, 32, 4, 1, states, rank) | {"order": order}

    def composed(x, dt_b_c, dt_weight, A, order, D, delta_bias):
        sequences = routes.scatter(x.mT.unflatten(2, (height, width)))
        low = torch.stack([dt_b_c[:, order[k].long(), k] for k in range(4)], dim=1).mT
        dt, b, c = low.split((rank, states, states), dim=2)
        parameters = A.flatten(0, 1), b.contiguous(), c.contiguous(), D.flatten(), None, delta_bias.flatten(), True
        y = selective_scan(sequences.flatten(1, 2), (dt_weight @ dt).flatten(1, 2), *parameters)
        return routes.gather(y.view(sequences.shape), (height, width)).flatten(2).mT

    leaves = {k: v if k == "order" else v.clone().requires_grad_() for k, v in inputs.items()}
    cotangent = torch.randn(2, height * width, 32, generator=torch.Generator().manual_seed(2))
    results = []
    for function in (cross_selective_scan, composed):
        with implementation():
            y = function(**leaves)
            grads = torch.autograd.grad(y, [v for k, v in leaves.items() if k != "order"], cotangent)
        results.append((y, *grads))
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        assert relative_rms(got, want) < 1e-5, index


def test_padding_lets_the_state_decay_and_positions_without_a_visit_are_zero(implementation):
    inputs = cross_inputs(1, 4, 1, 1, 5, 1, 1) | {"order": torch.tensor([[2, -1, -1, 0, -1]], dtype=torch.int32)}
    dt_b_c, x = inputs["dt_b_c"][0, :, 0], inputs["x"][0, :, 0]
    weight, A, D, bias = (inputs[name].item() for name in ("dt_weight", "A", "D", "delta_bias"))
    with implementation():
        y = cross_selective_scan(**inputs)[0, :, 0]

    def softplus(value):
        return torch.log1p(torch.exp(torch.as_tensor(value)))

    h = softplus(weight * dt_b_c[2, 0] + bias) * dt_b_c[2, 1] * x[2]
    torch.testing.assert_close(y[2], dt_b_c[2, 2] * h + D * x[2])
    h = h * torch.exp(2 * softplus(bias) * A)
    dt = softplus(weight * dt_b_c[0, 0] + bias)
    h = torch.exp(dt * A) * h + dt * dt_b_c[0, 1] * x[0]
    torch.testing.assert_close(y[0], dt_b_c[0, 2] * h + D * x[0])
    assert y[1] == 0 and y[3] == 0


def test_positions_without_a_visit_get_zero_gradients_from_poisoned_memory(implementation, poisoned_memory):
    inputs = cross_inputs(1, 6, 5, 2, 2, 2, 2)
    inputs["order"] = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    with implementation():
        got = output_and_gradients(inputs)
    assert not got["y"][:, 3:].any() and not got["dx"][:, 3:].any() and not got["ddt_b_c"][:, 3:].any()
    assert not got["ddt_b_c"][:, 0, 1].any() and not got["ddt_b_c"][:, 2, 0].any()


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_non_contiguous_inputs_give_the_same_numbers(implementation, separate):
    inputs = cross_inputs(2, 15, 8, 3, 15, 2, 3, separate=separate)
    changed = {name: tensor.mT.contiguous().mT for name, tensor in inputs.items() if tensor.ndim > 1}
    assert not any(tensor.is_contiguous() for tensor in changed.values())
    with implementation():
        got, want = output_and_gradients(changed), output_and_gradients(inputs)
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_an_empty_batch_gives_empty_output_and_zero_gradients(implementation):
    with implementation():
        got = output_and_gradients(cross_inputs(0, 9, 6, 2, 9, 4, 2))
    assert got["y"].shape == (0, 9, 6)
    for name in ("ddt_weight", "dA", "dD", "ddelta_bias"):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_an_item_does_not_depend_on_its_batch(implementation):
    inputs = cross_inputs(3, 20, 20, 2, 20, 4, 2)
    alone = {name: tensor[1:2] if name in ("x", "dt_b_c") else tensor for name, tensor in inputs.items()}
    with implementation():
        got, want = cross_selective_scan(**alone), cross_selective_scan(**inputs)[1:2]
    assert relative_rms(got, want) < 1e-6


def test_autocast_computes_and_returns_float32(implementation):
    inputs = cross_inputs(1, 20, 8, 2, 20, 4, 3)
    inputs["D"] = inputs["D"] * 1e6
    half = {k: v.to(torch.float16) if k in ("x", "dt_b_c") else v for k, v in inputs.items()}
    leaves = {k: v if k == "order" else v.clone().requires_grad_() for k, v in half.items()}
    with implementation(), torch.autocast("cpu", torch.float16):
        y = cross_selective_scan(**leaves)
        assert y.dtype == torch.float32 and y.abs().max() > torch.finfo(torch.float16).max
        y.sum().backward()
    assert leaves["x"].grad.dtype == torch.float16 and leaves["A"].grad.dtype == torch.float32
    with use_reference():
        want = cross_selective_scan(**{k: v if k == "order" else v.double() for k, v in half.items()})
    assert relative_rms(y, want) < 1e-5


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_gradcheck_in_float64(separate):
    inputs = cross_inputs(2, 6, 3, 2, 7, 2, 2, separate=separate, dtype=torch.float64)
    order = inputs.pop("order")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def scan(*tensors):
        return cross_selective_scan(**dict(zip(inputs, tensors, strict=True)), order=order)

    assert torch.autograd.gradcheck(scan, leaves)
    with use_reference():
        assert torch.autograd.gradcheck(scan, leaves)


@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["all", "none"])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_opcheck(absent, separate):
    inputs = cross_inputs(2, 18, 6, 3, 20, 3, 2, separate=separate, absent=absent)
    tensors = [inputs.get(name) for name in NAMES]
    leaves = [t if t is None or t.dtype == torch.int32 else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(forward_op, (*leaves, True))
    y, chunk_states = forward_op(*tensors, True)
    torch.library.opcheck(backward_op, (torch.randn_like(y), *tensors, chunk_states, True))


def test_compiles_without_graph_breaks():
    inputs = cross_inputs(1, 12, 4, 2, 12, 2, 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scan(**tensors):
        return cross_selective_scan(**tensors) * 2

    leaves = {k: v if k == "order" else v.clone().requires_grad_() for k, v in inputs.items()}
    y = scan(**leaves)
    y.sum().backward()
    assert torch.equal(y.detach(), 2 * cross_selective_scan(**inputs))
    assert all(torch.isfinite(t.grad).all() for k, t in leaves.items() if k != "order")


def test_only_chunk_states_are_kept_for_the_backward_pass():
    inputs = cross_inputs(1, 1024, 4, 2, 1024, 16, 2)
    leaves = {k: v if k == "order" else v.clone().requires_grad_() for k, v in inputs.items()}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cross_selective_scan(**leaves)
    assert sum(saved.values()) - sum(t.numel() for t in inputs.values()) <= 2 * 4 * num_chunks(1024) * 16


def test_a_table_changed_in_place_is_checked_again():
    inputs = cross_inputs(1, 9, 4, 2, 9, 1, 1)
    cross_selective_scan(**inputs)
    inputs["order"][1, 3] = 9
    with pytest.raises(ValueError, match=r"order has values from 0 to 9.*0 to 8"):
        cross_selective_scan(**inputs)


def bad(name, change, *words):
    return pytest.param(name, change, words, id=f"{name}-{'-'.join(words)}".replace(" ", "_"))


@pytest.mark.parametrize(
    "name,change,words",
    [
        bad("x", lambda x: x[0], "(9, 6)", "(batch, positions, channels)"),
        bad("x", lambda x: x[:, :, None].expand(2, 9, 4, 6), "(2, 9, 4, 6)", "3 routes"),
        bad("x", lambda x: x[:, :0], "at least one position"),
        bad("x", lambda x: x.long(), "int64", "float32"),
        bad("x", lambda x: None, "NoneType", "torch.Tensor"),
        bad("dt_b_c", lambda x: x[..., :-1], "(2, 9, 3, 7)", "(2, 9, 3, 8)"),
        bad("dt_b_c", lambda x: x.half(), "float16", "float32"),
        bad("dt_weight", lambda x: x[:, :-1], "(3, 5, 2)", "6 channels"),
        bad("dt_weight", lambda x: x[..., :0], "(3, 6, 0)", "rank of at least 1"),
        bad("dt_weight", lambda x: x.double(), "float64", "float32"),
        bad("A", lambda x: x[0], "(6, 3)", "3 routes"),
        bad("A", lambda x: x.half(), "float16", "float32"),
        bad("order", lambda x: x[0], "(9,)", "(routes, steps)"),
        bad("order", lambda x: x[:, :0], "at least one"),
        bad("order", lambda x: x.long(), "int64", "int32"),
        bad("order", lambda x: x + 1, "0 to 8", "-1"),
        bad("order", lambda x: x - 2, "-2", "-1"),
        bad("D", lambda x: x[:2], "(2, 6)", "(3, 6)"),
        bad("delta_bias", lambda x: x.bfloat16(), "bfloat16", "float32"),
        bad("delta_bias", lambda x: x.to("meta"), "meta", "cpu"),
    ],
)
def test_bad_arguments_are_named_with_what_came_and_what_is_needed(name, change, words):
    inputs = cross_inputs(2, 9, 6, 3, 9, 3, 2)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=rf"cross_selective_scan: {name} ") as error:
        cross_selective_scan(**inputs)
    for word in words:
        assert word in str(error.value)
