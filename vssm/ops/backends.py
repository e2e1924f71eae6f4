"""Which implementation serves which op on which device, and switches that force the slower ones."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import gpu, native

_reference = False


def reference_in_use() -> bool:
    """True inside `use_reference()`."""
    return _reference


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Inside the context every op of `vssm.ops` runs its sequential definition, differentiated by autograd.

    For tests and benchmarks: slow, and memory grows with batch * channels * length * states. Not thread-safe.
    """
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before


@contextlib.contextmanager
def use_portable() -> Iterator[None]:
    """Inside the context all native and Triton kernels are switched off and the portable implementations run.

    Not thread-safe.
    """
    with contextlib.ExitStack() as stack:
        for op, device in _registered():
            stack.enter_context(op.set_kernel_enabled(device, enabled=False))
        yield


class Backend(NamedTuple):
    """One row of `status()`: on `device`, `op` is served by `kernel`; `reason` says why nothing faster serves it."""

    op: str
    device: str
    kernel: str
    reason: str


def _ops() -> dict[str, tuple]:
    # The ops import this module.
    from .causal_conv1d import op as conv
    from .cross_selective_scan import op as cross
    from .local_bidirectional_scan import op as local_scan
    from .nc_ssd import op as nc_ssd
    from .selective_scan import op as scan
    from .ssd import op as ssd

    return {
        "selective_scan": (scan.forward_op, scan.backward_op),
        "causal_conv1d": (conv.forward_op, conv.backward_op),
        "cross_selective_scan": (cross.forward_op, cross.backward_op),
        "local_bidirectional_scan": (local_scan.forward_op, local_scan.backward_op),
        "ssd": (ssd.forward_op, ssd.backward_op),
        "nc_ssd": (nc_ssd.forward_op, nc_ssd.backward_op),
    }


# Ops that are nothing but matrix products: no device has a kernel of ours for them.
_MATRIX_PRODUCTS = ("nc_ssd",)


def _registered() -> Iterator[tuple]:
    devices = [] if native.library is None else ["cpu"]
    if not gpu.reason:
        devices.append("cuda")
    for name, ops in _ops().items():
        if name not in _MATRIX_PRODUCTS:
            yield from itertools.product(ops, devices)


def status() -> list[Backend]:
    """Rows (op, device, kernel, reason) for every op and every device type this process can use, the CPU first."""
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices.append(accelerator.type)
    rows = []
    for name in _ops():
        for device in devices:
            if name in _MATRIX_PRODUCTS:
                kernel, reason = "", "matrix products: PyTorch's own are the kernel"
            elif device == "cpu":
                kernel, reason = "native", native.reason
            elif device == "cuda":
                kernel, reason = "triton", gpu.reason
            else:
                kernel, reason = "", f"this version has no {device} kernel for this op"
            rows.append(Backend(name, device, "portable" if reason else kernel, reason))
    return rows
