"""Scan routes: how a map becomes K sequences for a scan and how their outputs become a map again.

A route object is all a scan layer knows about the geometry, so layers take one as an argument.

Letters: B batch, D channels, K routes, L sequence length, H height, W width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Routes(Protocol):
    """K ways to walk a map. `gather` puts every output back where `scatter` took its input and sums over routes.

    Routes hold no tensors, so they copy, pickle and compare freely and serve maps of any size.
    """

    num_routes: int

    def scatter(self, x: Tensor) -> Tensor:
        """Map (B, D, *size) -> sequences (B, K, D, L), contiguous."""

    def gather(self, y: Tensor, size: Sequence[int]) -> Tensor:
        """Sequences (B, K, D, L) -> map (B, D, *size)."""

    def table(self, size: Sequence[int], device: torch.device) -> Tensor:
        """int32 (K, L): the row-major index of the position that each route visits at each step, -1 for padding."""


class CrossRoutes:
    """Row by row, column by column, and both backwards (VMamba's cross-scan, arXiv 2401.10166, figure 3)."""

    num_routes = 4

    def scatter(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) -> sequences (B, 4, D, H*W) in the order rows, columns, reversed rows, reversed columns."""
        rows, columns = x.flatten(2), x.mT.flatten(2)
        return torch.stack((rows, columns, rows.flip(-1), columns.flip(-1)), dim=1)

    def gather(self, y: Tensor, size: Sequence[int]) -> Tensor:
        """Sequences (B, 4, D, H*W) -> map (B, D, H, W), the sum of the four."""
        height, width = size
        forwards, backwards = y.chunk(2, dim=1)
        rows, columns = (forwards + backwards.flip(-1)).unbind(1)
        return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT

    def table(self, size: Sequence[int], device: torch.device) -> Tensor:
        """int32 (4, H*W): the row-major index of the position that each route visits at each step."""
        key = (*size, device)
        if torch.compiler.is_compiling() or key not in _TABLES:
            # A table made in inference mode could not be saved for a backward pass later on.
            with torch.inference_mode(False):
                positions = torch.arange(size[0] * size[1], dtype=torch.int32, device=device)
                table = self.scatter(positions.view(1, 1, *size))[0, :, 0]
            # Compilers trace with tensors that have no values.
            if torch.compiler.is_compiling() or type(table) is not Tensor:
                return table
            _TABLES[key] = table
        return _TABLES[key]


# Tables of `CrossRoutes` by size and device.
_TABLES: dict[tuple, Tensor] = {}
