"""Every tolerance of the op tests, and the one way errors are measured: relative root mean square."""

from __future__ import annotations

import torch
from torch import Tensor

# float32: rounding of a few thousand accumulated terms. Half types: two units in the last place of the output.
RELATIVE_RMS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want over that of want; both are compared in float64. An empty tensor has error 0."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert torch.isfinite(got).all(), "non-finite values"
    scale = want.square().mean().sqrt().clamp_min(1e-12)
    return ((got - want).square().mean().sqrt() / scale).item()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, name: str) -> None:
    """Fails unless `got` agrees with the float64 result `want` as well as numbers of `dtype` allow."""
    error = relative_rms(got, want)
    assert error <= RELATIVE_RMS[dtype], f"{name}: relative RMS error {error:.3g} > {RELATIVE_RMS[dtype]:.3g}"


def assert_finite_where_it_fits(got: Tensor, wide: Tensor, name: str) -> None:
    """Fails unless `wide`, the float32 result, is finite and `got` is finite wherever its dtype can hold `wide`."""
    assert torch.isfinite(wide).all(), f"{name}: non-finite values in float32"
    fits = wide.abs() < torch.finfo(got.dtype).max * (1 - torch.finfo(got.dtype).eps)
    assert torch.isfinite(got[fits]).all(), f"{name}: non-finite values that fit into {got.dtype}"
