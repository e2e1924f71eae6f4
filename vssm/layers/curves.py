"""Curves through a plane: each takes any (H, W) array and returns its values in the order the curve meets them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def raster(grid: np.ndarray) -> np.ndarray:
    """Row by row."""
    return grid.ravel()


def snake(grid: np.ndarray) -> np.ndarray:
    """Row by row, every second one backwards."""
    grid = grid.copy()
    grid[1::2] = grid[1::2, ::-1]
    return grid.ravel()


def diagonals(grid: np.ndarray) -> np.ndarray:
    """JPEG's zigzag: diagonals from the upper left, up and right where row + column is even, else down and left."""
    row, column = np.indices(grid.shape)
    diagonal = row + column
    along = np.where(diagonal % 2 == 0, column, row)
    return grid.ravel()[np.lexsort((along.ravel(), diagonal.ravel()))]


def spiral(grid: np.ndarray) -> np.ndarray:
    """Clockwise from the upper left corner inwards."""
    parts = []
    while grid.size:
        parts.append(grid[0])
        # What is left, turned so that its next side lies on top.
        grid = np.rot90(grid[1:])
    return np.concatenate(parts)


def windows(grid: np.ndarray, side: int) -> np.ndarray:
    """Square windows row by row, inside each row by row; windows that stand out are cut."""
    row, column = np.indices(grid.shape)
    keys = (column, row, column // side, row // side)
    return grid.ravel()[np.lexsort([key.ravel() for key in keys])]


def _enclosing_bits(grid: np.ndarray) -> int:
    return max(int(max(grid.shape) - 1).bit_length(), 0)


def zorder(grid: np.ndarray) -> np.ndarray:
    """Morton's curve: by the interleaved bits of row and column, that of the column lowest."""
    row, column = np.indices(grid.shape)
    code = np.zeros_like(row)
    for bit in range(_enclosing_bits(grid)):
        code |= (column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1
    return grid.ravel()[np.argsort(code.ravel(), kind="stable")]


def hilbert(grid: np.ndarray) -> np.ndarray:
    """Hilbert's curve on the enclosing square, from the upper left to the upper right corner."""
    row = column = np.zeros(1, dtype=np.int64)
    for bit in range(_enclosing_bits(grid)):
        side = 1 << bit
        # Four copies: mirrored at the diagonal, below, below and right, mirrored at the other diagonal.
        row, column = (
            np.concatenate([column, row + side, row + side, side - 1 - column]),
            np.concatenate([row, column, column + side, 2 * side - 1 - row]),
        )
    inside = (row < grid.shape[0]) & (column < grid.shape[1])
    return grid[row[inside], column[inside]]


CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raster": raster,
    "snake": snake,
    "zigzag": diagonals,
    "zorder": zorder,
    "hilbert": hilbert,
}
