"""What tells whether a result was made from these files with these settings."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_READ_STEP = 1 << 20


def digest_files(paths: Iterable[Path], *words: str) -> str:
    """SHA-256 in hexadecimal of the contents of files, in this order, and of `words`; names do not count.

    Raises:
        OSError: a file cannot be read.
    """
    whole = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_READ_STEP):
                content.update(block)
        whole.update(content.digest())
    for word in words:
        whole.update(hashlib.sha256(word.encode()).digest())
    return whole.hexdigest()
