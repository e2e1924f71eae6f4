"""torch.func.vmap over every op and its backward pass: the same numbers as one call after the other."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tolerances import relative_rms
from torch.func import vmap

from vssm.ops import (
    causal_conv1d,
    cross_selective_scan,
    local_bidirectional_scan,
    nc_ssd,
    selective_scan,
    ssd,
    use_portable,
)

V = 3


def normal(*shape):
    return torch.randn(V, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def scan_tensors():
    per_item = {"u": normal(2, 6, 20), "delta": normal(2, 6, 20).abs()}
    per_item |= {"B": normal(2, 2, 4, 20), "C": normal(2, 2, 4, 20), "z": normal(2, 6, 20)}
    return per_item, {"A": -normal(6, 4).exp(), "D": normal(6), "delta_bias": normal(6).abs()}


def head_tensors(z=True):
    per_item = {"x": normal(2, 20, 4, 5), "dt": normal(2, 20, 4).abs(), "B": normal(2, 20, 2, 3)}
    per_item |= {"C": normal(2, 20, 2, 3)} | ({"z": normal(2, 20, 4, 5)} if z else {})
    return per_item, {"A": -normal(4).exp(), "D": normal(4), "dt_bias": normal(4).abs()}


def ssd_tensors():
    per_item, parameters = head_tensors()
    return per_item | {"initial_states": normal(2, 4, 5, 3)}, parameters


def along_routes(x, dt_b_c, dt_weight, A, D):
    return cross_selective_scan(x, dt_b_c, dt_weight, A, torch.arange(20, dtype=torch.int32).repeat(3, 1), D)


def route_tensors():
    per_item = {"x": normal(2, 20, 5), "dt_b_c": normal(2, 20, 3, 2 + 2 * 4)}
    return per_item, {"dt_weight": normal(3, 5, 2), "A": -normal(3, 5, 4).exp(), "D": normal(3, 5)}


CASES = {
    "cross_selective_scan": (along_routes, route_tensors),
    "selective_scan": (selective_scan, scan_tensors),
    "local_bidirectional_scan": (local_bidirectional_scan, scan_tensors),
    "causal_conv1d": (causal_conv1d, lambda: ({"x": normal(2, 6, 20)}, {"weight": normal(6, 4), "bias": normal(6)})),
    "ssd": (ssd, ssd_tensors),
    "nc_ssd": (nc_ssd, lambda: head_tensors(z=False)),
}


@pytest.fixture(params=["portable", "native"])
def implementation(request):
    """A context inside which the implementation of that name serves CPU tensors."""
    if request.param == "portable":
        return use_portable
    request.getfixturevalue("native_cpu")
    return contextlib.nullcontext


def check(function, batched, shared, in_dims=0):
    """vmap over the tensors in `batched`, along in_dims of each, is the same as a loop."""

    def call(tensors):
        return function(**tensors, **shared)

    dims = {name: in_dims for name in batched}
    moved = {name: tensor.movedim(0, in_dims) for name, tensor in batched.items()}
    got = vmap(call, in_dims=(dims,))(moved)
    want = [call({name: tensor[i] for name, tensor in batched.items()}) for i in range(V)]
    assert got.shape == (V, *want[0].shape)
    assert relative_rms(got, torch.stack(want)) < 1e-6


@pytest.mark.parametrize("in_dims", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_inputs_that_carry_the_batch_are_folded(implementation, name, in_dims):
    function, tensors = CASES[name]
    batched, parameters = tensors()
    with implementation():
        check(function, batched, {key: p[0] for key, p in parameters.items()}, in_dims)


@pytest.mark.parametrize("name", CASES)
def test_some_inputs_can_stay_the_same(implementation, name):
    function, tensors = CASES[name]
    per_item, parameters = tensors()
    first = next(iter(per_item))
    shared = {key: t[0] for key, t in (per_item | parameters).items() if key != first}
    with implementation():
        check(function, {first: per_item[first]}, shared)


@pytest.mark.parametrize("name", CASES)
def test_parameters_can_be_vmapped_with_and_without_inputs(implementation, name):
    function, tensors = CASES[name]
    per_item, parameters = tensors()
    with implementation():
        check(function, per_item | parameters, {})
        check(function, parameters, {key: t[0] for key, t in per_item.items()})


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_several_cotangents_at_once(implementation, name):
    function, tensors = CASES[name]
    per_item, parameters = tensors()
    leaves = {key: t[0].clone().requires_grad_() for key, t in (per_item | parameters).items()}
    with implementation():
        out = function(**leaves)
        cotangents = normal(*out.shape)
        got = torch.autograd.grad(out, leaves.values(), cotangents, is_grads_batched=True, retain_graph=True)
        for i in range(V):
            want = torch.autograd.grad(out, leaves.values(), cotangents[i], retain_graph=True)
            for key, batched, single in zip(leaves, got, want, strict=True):
                assert relative_rms(batched[i], single) < 1e-6, key


@pytest.mark.parametrize("name", CASES)
def test_vmapped_calls_are_differentiable(implementation, name):
    function, tensors = CASES[name]
    per_item, parameters = tensors()
    first = next(iter(per_item))
    leaf = per_item.pop(first).requires_grad_()
    shared = {key: t[0] for key, t in (per_item | parameters).items()}

    def call(x):
        return function(**{first: x}, **shared)

    with implementation():
        (got,) = torch.autograd.grad(vmap(call)(leaf).square().sum(), leaf)
        (want,) = torch.autograd.grad(sum(call(x).square().sum() for x in leaf), leaf)
    assert relative_rms(got, want) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_the_second_derivative_is_refused_by_name(name):
    function, tensors = CASES[name]
    per_item, parameters = tensors()
    first = next(iter(per_item))
    shared = {key: t[0] for key, t in (per_item | parameters).items()}
    leaf = shared.pop(first).requires_grad_()
    (gradient,) = torch.autograd.grad(function(**{first: leaf}, **shared).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"vssm.{name}_backward.*no autograd formula"):
        gradient.sum().backward()
