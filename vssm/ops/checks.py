"""Argument checks shared by the public ops: one sentence that names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(function: str, name: str, value: object) -> None:
    """Raises ValueError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{function}: {name} is {type(value).__name__}; it must be a torch.Tensor")


def check_shape(function: str, name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raises ValueError unless `tensor` has `shape`; `meaning` spells it out, e.g. "(batch, channels, length)"."""
    if tuple(tensor.shape) != tuple(shape):
        came, needed = tuple(tensor.shape), tuple(shape)
        raise ValueError(f"{function}: {name} has shape {came}; it must be {needed}, that is {meaning}")


def check_dtype(function: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], why: str) -> None:
    """Raises ValueError unless the dtype of `tensor` is one of `dtypes`; `why` completes "it must be ..."."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        came = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{function}: {name} is {came}; it must be {names} {why}".rstrip())


def check_device(function: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless `tensor` lies on `device`."""
    if tensor.device != device:
        raise ValueError(f"{function}: {name} is on {tensor.device}; move it to {device}, where the first argument is")


def under_autocast(tensor: object) -> bool:
    """Whether autocast is on for the device of `tensor`; False for what is no tensor or is on a device without it."""
    # The meta device, where only shapes are computed, has no autocast and refuses the question.
    return isinstance(tensor, Tensor) and not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
