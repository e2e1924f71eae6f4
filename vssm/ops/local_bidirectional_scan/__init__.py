"""Locally bi-directional scan of LBMamba: the public function, its checks and its documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..checks import under_autocast
from ..selective_scan import check_arguments, per_group
from . import op
from .reference import local_bidirectional_scan_reference

__all__ = ["local_bidirectional_scan"]


def local_bidirectional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    window: int | None = None,
) -> Tensor:
    """Selective scan that also looks ahead within short windows (LBMamba, arXiv 2506.15976).

    With dt as in `selective_scan`, a[t] = exp(dt[t] * A[d, n]) and x[t] = dt[t] * B[n, t] * u[t],
        h[t] = a[t] * h[t-1] + x[t],                      h[-1] = 0,
        r[t] = a[t] * (r[t+1] + x[t+1]),                  r = 0 at the last step of each window,
        y[t] = sum over n of C[n, t] * (h[t] + r[t])  +  D[d] * u[t],
        out[t] = y[t] * silu(z[t]) if z is given, else y[t].
    Windows of `window` steps are counted from the first step on; the last one ends with the sequence. A window of one
    step gives `selective_scan`. Argument names, shapes, dtypes, accumulation and autocast are those of
    `selective_scan`. Differentiable once, in every tensor argument.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as in `selective_scan`.
        window: steps per window, at least 1. None takes the official table: 4 up to 128 steps, 8 up to 256, else 16.

    Returns:
        (batch, channels, length) in u's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or window that does not fit, naming the argument, what came and what is
            needed.
    """
    name = "local_bidirectional_scan"
    autocast = under_autocast(u)
    check_arguments(name, u, delta, A, B, C, D, z, delta_bias, same_dtype=not autocast)
    length = u.shape[2]
    if window is None:
        window = official_window(length)
    elif not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"{name}: window is {window!r}; it must be None or a whole number of steps, at least 1")
    # A longer window than the sequence changes nothing; 16 steps is what the kernels take at most.
    window = min(window, max(length, 16))
    B, C = per_group(B, C, u)
    if backends.reference_in_use():
        u = u.float() if autocast and u.dtype != torch.float64 else u
        return local_bidirectional_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window)
    tensors = [t if t is None else t.contiguous() for t in (u, delta, A, B, C, D, z, delta_bias)]
    out, _ = op.forward_op(*tensors, delta_softplus, window)
    return out


def official_window(length: int) -> int:
    """The window of the official code for a sequence of `length` steps."""
    return 4 if length <= 128 else 8 if length <= 256 else 16
