"""Step sizes and decays at which scans have overflowed or turned NaN elsewhere, for tests of finiteness."""

from __future__ import annotations

import torch
from torch import Tensor

DECAYS = (-1e-3, -1.0, -30.0, -1e3)


def extreme_steps(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> Tensor:
    """Step sizes 0, 1e-6 and 50: long runs of each along `dim`, then all in random order."""
    values = torch.tensor([0.0, 1e-6, 50.0], dtype=dtype)
    order = torch.randint(3, shape, generator=torch.Generator().manual_seed(2))
    run = -(-shape[dim] // 6)
    for index in range(3):
        order.narrow(dim, index * run, run).fill_(index)
    return values[order]
