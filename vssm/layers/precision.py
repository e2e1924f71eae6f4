"""Leaving autocast, on any device."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which operations on the device of `x` keep the dtypes they are given."""
    # The meta device has no autocast and refuses the context.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
