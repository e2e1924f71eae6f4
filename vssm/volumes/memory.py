"""Memory that is left to this process, so that a volume too large is refused before anything is allocated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..machine import available_memory
from .errors import VolumeError

# what devices without an exception of their own say
_NO_MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator")


def fits_memory(needed: int) -> bool:
    """Whether `needed` bytes are available, as far as the system tells."""
    available = available_memory()
    return available is None or needed <= available


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Check that `needed` bytes are available.

    Raises:
        VolumeError: if they are not; the message reads "{what} needs about x GB of memory and ...; {remedy}".
    """
    available = available_memory()
    if available is not None and needed > available:
        raise VolumeError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available; {remedy}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of Python, NumPy or torch says that memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _NO_MEMORY_WORDS
    )


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """For work whose need was estimated too low: exhausted memory is a VolumeError about `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise VolumeError(f"{what} does not fit into memory; crop the volume or use a larger machine") from None
