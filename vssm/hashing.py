"""Hashes of files."""

import hashlib
from pathlib import Path

_READ_STEP = 1 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    content = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_STEP):
            content.update(block)
    return content.hexdigest()
