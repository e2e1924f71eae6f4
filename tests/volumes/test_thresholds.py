"""The threshold baselines are tuned as well as they can be."""

import itertools

import pytest
import torch

from vssm.volumes.thresholds import tune_thresholds
from vssm.volumes.training import dice_scores


@pytest.fixture
def tissue():
    """labels (16, 16, 16) in blocks, and a noisy scan of them with means 0, 2, 3."""
    torch.manual_seed(0)
    labels = torch.zeros(16, 16, 16, dtype=torch.long)
    labels[2:14, 2:14, 2:14], labels[5:11, 5:11, 5:11] = 1, 2
    means = torch.tensor([0.0, 2.0, 3.0])
    return means[labels] + 0.5 * torch.randn(labels.shape), labels


def mean_dice(thresholds, scan, labels):
    return sum(dice_scores(thresholds(scan), labels, 3)) / 2


def test_no_pair_of_thresholds_on_a_coarse_grid_is_better(tissue):
    scan, labels = tissue
    tuned = mean_dice(tune_thresholds([scan], [labels]), scan, labels)
    grid = torch.linspace(scan.min().item(), scan.max().item(), 40).tolist()
    for low, high in itertools.combinations(grid, 2):
        found = (scan >= low).long() + (scan >= high).long()
        assert sum(dice_scores(found, labels, 3)) / 2 <= tuned + 0.002


def test_smoothing_is_chosen_when_it_helps_and_left_out_when_it_does_not(tissue):
    scan, labels = tissue
    plain, smoothed = (tune_thresholds([scan], [labels], sigmas) for sigmas in ([0.0], [0.0, 0.6, 0.8]))
    assert smoothed.sigma > 0
    assert mean_dice(smoothed, scan, labels) > mean_dice(plain, scan, labels)
    clean = torch.tensor([0.0, 2.0, 3.0])[labels]
    assert tune_thresholds([clean], [labels], [0.0, 1.0]).sigma == 0


def test_all_scans_count(tissue):
    scan, labels = tissue
    brighter = tune_thresholds([scan + 1], [labels])
    both = tune_thresholds([scan, scan + 1], [labels, labels])
    assert tune_thresholds([scan], [labels]).low < both.low < brighter.low


def test_nothing_to_tune_on_is_refused():
    with pytest.raises(ValueError, match="scans with labels"):
        tune_thresholds([], [])
