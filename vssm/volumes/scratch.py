"""Arrays that may be larger than the memory: they then lie in a temporary file that has no name."""

import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from .errors import VolumeError


def new_array(shape: tuple[int, ...], dtype: type[np.generic], folder: Path | None = None) -> np.ndarray:
    """Zeros in memory or, with a `folder`, in a file there that the system removes with the array or the process.

    The file's place on the disk is taken at once: a disk that is full is told here and not in the middle of the work.

    Raises:
        VolumeError: the folder's disk has too little space or the folder cannot be written to.
    """
    if folder is None:
        return np.zeros(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        free = shutil.disk_usage(folder).free
        if size > free:
            raise VolumeError(
                f"{folder}: {size / 1e9:.1f} GB are needed for values that do not fit into memory and {free / 1e9:.1f} "
                "GB are free; free some space"
            )
        with tempfile.TemporaryFile(dir=folder, prefix=".vssm.") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            # the mapping keeps the file after it is closed
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise VolumeError(
            f"{folder}: cannot take {size / 1e9:.1f} GB of values that do not fit into memory "
            f"({error.strerror or error}); choose another folder for the result"
        ) from None
