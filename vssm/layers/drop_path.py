"""The schedule of stochastic depth (arXiv 1603.09382) that the family shares."""

from collections.abc import Sequence

import torch


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Probability of dropping each block, per stage of `depths`: linear from 0 to `last` over all blocks."""
    rates = torch.linspace(0.0, last, sum(depths), device="cpu")
    return [stage.tolist() for stage in rates.split(list(depths))]
