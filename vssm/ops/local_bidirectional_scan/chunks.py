"""How a sequence is cut into chunks of whole windows."""

from __future__ import annotations

from ..selective_scan.chunks import chunk_length


def windowed_chunk_length(length: int, window: int) -> int:
    """Steps per chunk: that of the selective scan, rounded up to whole windows; the same for the official windows."""
    return -(-chunk_length(length) // window) * window


def windowed_num_chunks(length: int, window: int) -> int:
    """Number of chunks of `windowed_chunk_length` steps that cover `length` steps."""
    return -(-length // windowed_chunk_length(length, window))
