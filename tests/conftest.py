"""Fixtures of all tests: native back ends that must be there, poisoned uninitialised memory, the command line."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from vssm import cli
from vssm.ops import native

REQUIRED = set(filter(None, os.environ.get("VSSM_REQUIRE_BACKENDS", "").split(",")))


def require(backend: str, reason: str) -> None:
    """Skips the test or test file for want of `backend`; fails it where VSSM_REQUIRE_BACKENDS names that back end."""
    message = f"no {backend} back end: {reason}"
    if backend in REQUIRED:
        pytest.fail(message)
    pytest.skip(message, allow_module_level=True)


@pytest.fixture(autouse=True)
def own_processes():
    """Accelerate keeps its state, precision included, for the life of Python: no test meets that of another."""
    _forget_processes()
    yield
    _forget_processes()


def _forget_processes() -> None:
    # not imported for tests that do not use it
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def native_cpu():
    """The loaded native CPU library."""
    if native.library is None:
        require("cpu", native.reason)
    return native.library


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills what torch.empty and friends return with NaN, so that an output nobody writes shows."""

    def poison(function):
        def wrapped(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapped

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty",):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (status, standard output, standard error)."""

    def call(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the one line that a call with status 2 prints."""

    def call(*arguments):
        status, out, err = run(*arguments)
        assert status == 2
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return call
