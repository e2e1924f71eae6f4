"""Fixtures of all tests: which native back ends must be there, and poisoned uninitialised memory."""

from __future__ import annotations

import os

import pytest
import torch

from vssm.ops import native

REQUIRED = set(filter(None, os.environ.get("VSSM_REQUIRE_BACKENDS", "").split(",")))


def require(backend: str, reason: str) -> None:
    """Skips the test or test file for want of `backend`; fails it where VSSM_REQUIRE_BACKENDS names that back end."""
    message = f"no {backend} back end: {reason}"
    if backend in REQUIRED:
        pytest.fail(message)
    pytest.skip(message, allow_module_level=True)


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
