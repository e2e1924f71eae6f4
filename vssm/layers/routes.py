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
