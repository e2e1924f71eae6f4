"""Files that are whole or not there, whatever interrupts their writing."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replaced_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that appears as `path`, or replaces it, only once it is complete and on disk.

    Whatever happens before that, an interruption included, leaves `path` as it was and no temporary file; after a
    killed process a file named .NAME.*.partial may stay.

    Raises:
        OSError: the system refuses.
    """
    # a link stays a link: its target is replaced
    path = Path(path).resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; results get the rights any new file gets
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
