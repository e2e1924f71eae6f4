"""Scan routes: the orders in which K sequences walk a map or a volume, and the way there and back.

A route object is all a scan layer knows about the geometry, so layers take one as an argument. Routes are frozen
dataclasses without tensors: they copy, pickle, compare and serve maps of any size. The curves themselves are in
`curves.py`.

Letters: B batch, D channels, K routes, L steps of a sequence, P positions of the map (the product of its sizes).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from . import curves

# Tables of this many (routes, size, device) are kept: a model needs one per resolution.
_KEPT = 128
_tables: dict[tuple, tuple[Tensor, Tensor]] = {}


class Routes(ABC):
    """K ways to walk a map. `gather` puts every output back where `scatter` took its input and sums over routes.

    A subclass is a frozen dataclass with `num_routes` and `orders`. Under torch.compile and torch.export the tables are
    constants of the graph, which is then one for maps of this size.
    """

    num_routes: ClassVar[int]

    @abstractmethod
    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        """(K, L) integers: the position, row-major in a map of `size`, that each route visits at each step.

        A route visits a position at most once; -1 is a step of padding, where the input is zero.

        Raises:
            ValueError: the routes cannot walk a map of this size.
        """

    def table(self, size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """`orders` as an int32 tensor on `device`, kept for the next call."""
        return self._both_tables(size, device)[0]

    def scatter(self, x: Tensor) -> Tensor:
        """Map (B, D, *size) -> sequences (B, K, D, L), contiguous."""
        order, _ = self._both_tables(x.shape[2:], x.device)
        # Position P, where the tables point instead of -1, holds the zero of padding.
        x = pad(x.flatten(2), (0, 1))
        return torch.stack([x.index_select(2, route) for route in order % x.shape[2]], dim=1)

    def gather(self, y: Tensor, size: Sequence[int]) -> Tensor:
        """Sequences (B, K, D, L) -> map (B, D, *size)."""
        _, inverse = self._both_tables(size, y.device)
        y = pad(y, (0, 1))
        # A sum of selections rather than an addition into places: that has no fixed order on GPUs.
        total = sum(y[:, k].index_select(2, route) for k, route in enumerate(inverse % y.shape[3]))
        return total.unflatten(2, tuple(size))

    def along(self, x: Tensor, size: Sequence[int]) -> Sequence[Tensor]:
        """Positions (B, P, D) of a map of `size`, channels last -> the sequence (B, L, D) of every route."""
        return _select(x, self._both_tables(size, x.device)[0])

    def back(self, sequences: Sequence[Tensor], size: Sequence[int]) -> Sequence[Tensor]:
        """K sequences (B, L, D) -> each at its positions (B, P, D), 0 where its route does not pass."""
        _, inverse = self._both_tables(size, sequences[0].device)
        return [_select(y, route[None])[0] for y, route in zip(sequences, inverse, strict=True)]

    def _both_tables(self, size: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        # torch.compile turns a size that has changed into a symbol, which index() fixes again and int() does not.
        return _tables_of(self, tuple(index(side) for side in size), str(device))


def _select(x: Tensor, rows: Tensor) -> list[Tensor]:
    """Of x (B, P, D) the rows that each line of `rows` names, in that order; zeros for -1."""
    x = pad(x, (0, 0, 0, 1))
    return [x.index_select(1, line) for line in rows % x.shape[1]]


# Executed, not traced, by torch.compile: the curves are Python loops over positions.
@torch.compiler.assume_constant_result
def _tables_of(routes: Routes, size: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Order (K, L) and its inverse (K, P), the step at which a route visits a position or -1; both int32."""
    key = (routes, size, device)
    if key not in _tables:
        order = np.ascontiguousarray(routes.orders(size), dtype=np.int32)
        positions = int(np.prod(size))
        inverse = np.full((len(order), positions + 1), -1, dtype=np.int32)
        np.put_along_axis(inverse, order.astype(np.int64), np.arange(order.shape[1], dtype=np.int32)[None], axis=1)
        # Padding went to the last place, as -1 does.
        inverse = np.ascontiguousarray(inverse[:, :positions])
        # What inference mode makes could not be saved for a backward pass later on.
        with torch.inference_mode(False):
            made = tuple(torch.from_numpy(array).to(device) for array in (order, inverse))
        # The fake tensors of torch.export must not outlive the export.
        if any(type(tensor) is not Tensor for tensor in made):
            return made
        while len(_tables) >= _KEPT:
            _tables.pop(next(iter(_tables)))
        _tables[key] = made
    return _tables[key]


def _raster(size: tuple[int, ...]) -> np.ndarray:
    """Row-major positions of a map, in the shape of the map."""
    return np.arange(int(np.prod(size)), dtype=np.int64).reshape(size)


def _plane(routes: Routes, size: tuple[int, ...]) -> np.ndarray:
    """Row-major positions of a plane; ValueError for anything but two sizes."""
    if len(size) != 2:
        raise ValueError(f"{type(routes).__name__} walks maps of two sizes (height, width), got {size}")
    return _raster(size)


def _there_and_back(*orders: np.ndarray) -> np.ndarray:
    """Each order followed by its reverse."""
    return np.stack([way for order in orders for way in (order, order[::-1])])


def _all_there_all_back(*orders: np.ndarray) -> np.ndarray:
    """All orders, then all of them reversed."""
    return np.stack([*orders, *(order[::-1] for order in orders)])


@dataclass(frozen=True)
class CrossRoutes(Routes):
    """VMamba's cross-scan (arXiv 2401.10166, figure 3): rows, columns, and both backwards.

    With `spatial_dims=3` the same idea in a volume: six routes, each axis the fastest once, there and back.
    """

    spatial_dims: int = 2

    @property
    def num_routes(self) -> int:
        return 2 * self.spatial_dims

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        if len(size) != self.spatial_dims:
            raise ValueError(f"CrossRoutes(spatial_dims={self.spatial_dims}) cannot walk a map of size {size}")
        grid, dims = _raster(size), range(self.spatial_dims)
        # Cyclic orders of the axes: in the plane, rows and columns.
        ways = [grid.transpose([(axis + shift) % len(size) for axis in dims]).ravel() for shift in dims]
        return _all_there_all_back(*ways)


@dataclass(frozen=True)
class SelectedRoutes(Routes):
    """Some of other routes, in the order of `indices`; those may leave positions out.

    Args:
        routes: the routes to choose from.
        indices: at least one number of theirs, from 0.
    """

    routes: Routes
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        last = self.routes.num_routes - 1
        if not self.indices or not all(0 <= k <= last for k in self.indices):
            raise ValueError(f"SelectedRoutes: indices is {self.indices}; it must hold numbers from 0 to {last}")

    @property
    def num_routes(self) -> int:
        return len(self.indices)

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        return self.routes.orders(size)[list(self.indices)]


@dataclass(frozen=True)
class BidirectionalRoutes(Routes):
    """Row-major order and its reverse (Vim, arXiv 2401.09417), for any number of sizes."""

    num_routes = 2

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        return _there_and_back(_raster(size).ravel())

    # What the tables say, without copies by index.
    def along(self, x: Tensor, size: Sequence[int]) -> Sequence[Tensor]:
        return x, x.flip(1)

    def back(self, sequences: Sequence[Tensor], size: Sequence[int]) -> Sequence[Tensor]:
        there, back = sequences
        return there, back.flip(1)


@dataclass(frozen=True)
class AtrousRoutes(Routes):
    """EfficientVMamba's atrous scan (arXiv 2403.09977): each route walks one of the four phases of a 2 x 2 grid.

    In (row, column) parity: (0, 0) by rows, (1, 0) by columns, (0, 1) by rows, (1, 1) by columns. Maps of odd size are
    walked as if padded with zeros at the bottom and right.
    """

    num_routes = 4

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        height, width = size if len(size) == 2 else _plane(self, size).shape
        grid = np.pad(_plane(self, size), ((0, height % 2), (0, width % 2)), constant_values=-1)
        phases = [(grid[row::2, column::2], row) for column in (0, 1) for row in (0, 1)]
        return np.stack([(phase.T if by_columns else phase).ravel() for phase, by_columns in phases])


@dataclass(frozen=True)
class RasterRoutes(Routes):
    """Rows, rows backwards, columns, columns backwards: head Z of MHS-VM (arXiv 2406.05992)."""

    num_routes = 4

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        grid = _plane(self, size)
        return _there_and_back(grid.ravel(), grid.T.ravel())


@dataclass(frozen=True)
class SnakeRoutes(Routes):
    """Rows, every second one backwards; that reversed; the same for columns. Head C of MHS-VM; PlainMamba, VCMamba."""

    num_routes = 4

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        grid = _plane(self, size)
        return _there_and_back(curves.snake(grid), curves.snake(grid.T))


@dataclass(frozen=True)
class DiagonalRoutes(Routes):
    """Diagonals in alternating direction from the upper left corner, and from the upper right: head X of MHS-VM."""

    num_routes = 4

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        grid = _plane(self, size)
        return _there_and_back(curves.diagonals(grid), curves.diagonals(grid[:, ::-1]))


@dataclass(frozen=True)
class SpiralRoutes(Routes):
    """Inward spirals, clockwise from the upper left and counter-clockwise from the lower left: head S of MHS-VM."""

    num_routes = 4

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        grid = _plane(self, size)
        return _there_and_back(curves.spiral(grid), curves.spiral(grid[::-1]))


@dataclass(frozen=True)
class CurveRoutes(Routes):
    """A curve on the map, its transpose, both on the map turned by 90 degrees, and all backwards (MambaAD, 2404.06564).

    Args:
        curve: "raster", "snake", "zigzag", "zorder" or "hilbert"; the last two visit, where a size is no power of two,
            the positions in the order in which the curve on the enclosing square meets them.
        num_routes: 2, 4 or 8: the curve alone, with its transpose, with the turned ones; each there and back.
    """

    curve: str
    num_routes: int = 8

    def __post_init__(self) -> None:
        if self.curve not in curves.CURVES:
            raise ValueError(f"CurveRoutes: curve is {self.curve!r}; it must be one of {', '.join(curves.CURVES)}")
        if self.num_routes not in (2, 4, 8):
            raise ValueError(f"CurveRoutes: num_routes is {self.num_routes}; it must be 2, 4 or 8")

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        grid = _plane(self, size)
        turned = np.rot90(grid)
        views = (grid, grid.T, turned, turned.T)[: self.num_routes // 2]
        return _all_there_all_back(*(curves.CURVES[self.curve](view) for view in views))


@dataclass(frozen=True)
class WindowRoutes(Routes):
    """Windows one after the other, inside each the cross-scan's four orders (LocalMamba, arXiv 2403.09338).

    Args:
        window: side of the square windows; those at the bottom and right are cut where the map ends.
    """

    window: int
    num_routes = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"WindowRoutes: window is {self.window}; it must be at least 1")

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        grid = _plane(self, size)
        return _all_there_all_back(curves.windows(grid, self.window), curves.windows(grid.T, self.window))


@dataclass(frozen=True)
class TriOrientedRoutes(Routes):
    """SegMamba's three orientations (arXiv 2401.13560): row-major, backwards, and across slices.

    Args:
        num_slices: runs of equal length into which the row-major sequence is cut; the third route visits the first
            voxel of each run, then the second of each. None: the slices along the first axis of the volume.
    """

    num_slices: int | None = None
    num_routes = 3

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        order = _raster(size).ravel()
        return np.stack([order, order[::-1], order.reshape(self._slices(size), -1).T.ravel()])

    # What the tables say, without copies by index.
    def along(self, x: Tensor, size: Sequence[int]) -> Sequence[Tensor]:
        return x, x.flip(1), x.unflatten(1, (self._slices(size), -1)).transpose(1, 2).flatten(1, 2)

    def back(self, sequences: Sequence[Tensor], size: Sequence[int]) -> Sequence[Tensor]:
        there, back, across = sequences
        return there, back.flip(1), across.unflatten(1, (-1, self._slices(size))).transpose(1, 2).flatten(1, 2)

    def _slices(self, size: Sequence[int]) -> int:
        """Number of slices; ValueError unless they cut a volume of `size` into equal runs."""
        slices, voxels = self.num_slices or size[0], math.prod(size)
        if voxels % slices:
            raise ValueError(
                f"TriOrientedRoutes: {voxels} voxels of {tuple(size)} cannot be cut into {slices} equal slices"
            )
        return slices


@dataclass(frozen=True)
class GivenRoutes(Routes):
    """Routes written down for maps of one size.

    Args:
        size: the size of the maps.
        given: K rows of row-major positions, each a permutation, or part of one, with -1 for steps of padding.
    """

    size: tuple[int, ...]
    given: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        rows, positions = self.given, int(np.prod(self.size))
        if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
            raise ValueError("GivenRoutes: given must hold at least one route, all of the same length")
        for k, row in enumerate(rows):
            visited = [position for position in row if position != -1]
            if len(set(visited)) != len(visited) or not all(0 <= p < positions for p in visited):
                raise ValueError(
                    f"GivenRoutes: route {k} must visit positions 0 to {positions - 1} of a map of size {self.size}, "
                    "each at most once, with -1 for padding"
                )

    @property
    def num_routes(self) -> int:
        return len(self.given)

    def orders(self, size: tuple[int, ...]) -> np.ndarray:
        if size != tuple(self.size):
            raise ValueError(f"GivenRoutes: these routes are for maps of size {tuple(self.size)}, got {size}")
        return np.array(self.given)
