"""How a sequence is cut into chunks: the one fact every implementation of the scan shares."""

from __future__ import annotations


def chunk_length(length: int) -> int:
    """Steps per chunk for a sequence of `length` steps: the power of two next above its square root, at least 16.

    Both the number of chunks and the steps within one then grow with the square root of the length, which bounds the
    sequential steps of the portable scan and the memory of the saved chunk states.
    """
    chunk = 16
    while chunk * chunk < length:
        chunk *= 2
    return chunk


def num_chunks(length: int) -> int:
    """Number of chunks of `chunk_length(length)` steps that cover `length` steps."""
    return -(-length // chunk_length(length))
