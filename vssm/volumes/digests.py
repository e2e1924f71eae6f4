"""What tells whether a result was made from these files with these settings."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ..hashing import file_sha256


def digest_files(paths: Iterable[Path], *words: str) -> str:
    """SHA-256 in hexadecimal of the contents of files, in this order, and of `words`; names do not count.

    Raises:
        OSError: a file cannot be read.
    """
    whole = hashlib.sha256()
    for path in paths:
        whole.update(bytes.fromhex(file_sha256(path)))
    for word in words:
        whole.update(hashlib.sha256(word.encode()).digest())
    return whole.hexdigest()
