"""Tissue by two thresholds on the intensity: the baseline that a network for T1 scans has to beat.

In a T1 scan fluid and the stripped outside are dark, grey matter is brighter and white matter brightest.
Letters: X, Y, Z are the voxels of a scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.transforms import GaussianSmooth
from torch import Tensor

# intensities are sorted into this many classes for the search
_BINS = 500


@dataclass(frozen=True)
class Thresholds:
    """Grey matter from `low` on, white matter from `high` on, after smoothing with a Gaussian of `sigma` voxels."""

    low: float
    high: float
    sigma: float

    def __call__(self, scan: Tensor) -> Tensor:
        """Labels 0, 1, 2 (X, Y, Z) int64 of a scan (X, Y, Z)."""
        smooth = _smooth(scan, self.sigma)
        return (smooth >= self.low).long() + (smooth >= self.high).long()


def tune_thresholds(scans: Sequence[Tensor], labels: Sequence[Tensor], sigmas: Sequence[float] = (0.0,)) -> Thresholds:
    """The smoothing and the pair of thresholds with the best mean Dice of grey and white matter over all scans.

    Every pair on a grid of 500 intensities is tried for every smoothing.

    Args:
        scans: (X, Y, Z) float32 each, on a common intensity scale.
        labels: (X, Y, Z) each, 0 background, 1 grey, 2 white matter.
        sigmas: smoothing widths to choose from, in voxels; 0 is none.

    Raises:
        ValueError: nothing to tune on.
    """
    if not scans or not sigmas or len(scans) != len(labels):
        raise ValueError(f"thresholds need scans with labels and a sigma, got {len(scans)}, {len(labels)}, {sigmas}")
    truth = torch.cat([part.flatten() for part in labels])
    best, chosen = -1.0, None
    for sigma in sigmas:
        values = torch.cat([_smooth(scan, sigma).flatten() for scan in scans])
        edges = torch.linspace(values.min().item(), values.max().item(), _BINS + 1)
        # below[k, i]: voxels of label k under edge i
        counts = torch.stack([torch.histogram(values[truth == label], edges).hist for label in range(3)])
        below = torch.nn.functional.pad(counts.double().cumsum(dim=1), (1, 0))
        totals, under = below[:, -1], below.sum(dim=0)
        found_grey, right_grey = under - under[:, None], below[1] - below[1][:, None]
        dice_grey = 2 * right_grey / (found_grey + totals[1])
        dice_white = 2 * (totals[2] - below[2]) / (under[-1] - under + totals[2])
        mean = torch.triu((dice_grey + dice_white) / 2)
        score = mean.max().item()
        if score > best:
            low, high = divmod(int(mean.argmax()), _BINS + 1)
            best, chosen = score, Thresholds(edges[low].item(), edges[high].item(), sigma)
    return chosen


def _smooth(scan: Tensor, sigma: float) -> Tensor:
    return GaussianSmooth(sigma)(scan[None])[0] if sigma else scan
