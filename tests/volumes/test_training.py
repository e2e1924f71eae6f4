"""Training: patches lie where they should, the loop learns, repeats itself exactly and stops at broken numbers."""

import copy

import pytest
import torch
from torch import nn

from vssm.volumes.training import PatchSampler, Recipe, TrainingError, dice_scores, fit

RECIPE = Recipe(steps=60, learning_rate=0.2, warmup=0.2, weight_decay=0.0, max_gradient=5.0, average_decay=0.8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Conv3d(1, 3, 1)


def batches(seed=0):
    """Images whose labels follow from the intensity: below -1, up to 1, above."""
    source = torch.Generator().manual_seed(seed)

    def next_batch():
        images = torch.randn((2, 1, 6, 6, 6), generator=source) * 2
        return images, (images > -1).long() + (images > 1).long()

    return next_batch


def test_patches_stay_inside_and_hold_their_labelled_centre(generator):
    labels = torch.zeros(20, 16, 12, dtype=torch.long)
    labels[18:, :3, 5] = 1
    sampler = PatchSampler(labels, (8, 6, 4), 0.0, generator)
    for _ in range(50):
        patch = sampler()
        assert labels[patch].shape == (8, 6, 4)
        assert labels[patch].any()


def test_patches_anywhere_reach_every_corner(generator):
    labels = torch.zeros(5, 5, 5, dtype=torch.long)
    labels[2, 2, 2] = 1
    sampler = PatchSampler(labels, (4, 4, 4), 1.0, generator)
    assert len({tuple(part.start for part in sampler()) for _ in range(200)}) == 8


def test_patches_that_do_not_fit_and_labels_without_foreground_are_refused(generator):
    with pytest.raises(ValueError, match="do not fit"):
        PatchSampler(torch.ones(8, 8, 8), (8, 9, 8), 0.5, generator)
    with pytest.raises(ValueError, match="background only"):
        PatchSampler(torch.zeros(8, 8, 8), (4, 4, 4), 0.5, generator)


def test_dice_of_known_overlaps():
    truth = torch.tensor([0, 1, 1, 2, 2, 2])
    assert dice_scores(truth, truth, 3) == (1.0, 1.0)
    assert dice_scores(torch.tensor([1, 1, 0, 2, 0, 0]), truth, 3) == (0.5, 0.5)
    assert dice_scores(torch.zeros(6), truth, 3) == (0.0, 0.0)


def test_dice_of_a_label_that_is_absent_and_not_found_is_one():
    assert dice_scores(torch.tensor([0, 1]), torch.tensor([0, 1]), 3) == (1.0, 1.0)


def test_it_learns_and_reports_every_step(network):
    steps = []
    trained = fit(network, batches(), RECIPE, steps.append)
    assert [step.number for step in steps] == list(range(1, RECIPE.steps + 1))
    assert steps[-1].loss < 0.7 * steps[0].loss
    images, labels = batches(seed=9)()
    assert min(dice_scores(trained(images).argmax(dim=1), labels[:, 0], 3)) > 0.75
    assert not trained.training


def test_the_result_is_the_average_not_the_last_iterate(network):
    trained = fit(network, batches(), RECIPE)
    assert not torch.equal(trained.weight, network.weight)
    no_average = fit(copy.deepcopy(network), batches(), Recipe(**{**vars(RECIPE), "average_decay": 0.0}))
    last = fit(again := copy.deepcopy(network), batches(), Recipe(**{**vars(RECIPE), "average_decay": 0.0}))
    torch.testing.assert_close(last.weight, again.weight)
    torch.testing.assert_close(last.weight, no_average.weight, atol=0, rtol=0)


def test_equal_seeds_give_equal_weights(network):
    twin = copy.deepcopy(network)
    one, two = (fit(module, batches(), RECIPE) for module in (network, twin))
    torch.testing.assert_close(one.weight, two.weight, atol=0, rtol=0)


def test_broken_images_stop_the_training_and_are_named(network):
    good = batches()

    def next_batch():
        images, labels = good()
        if next_batch.calls == 2:
            images[0, 0, 0, 0, 0] = float("nan")
        next_batch.calls += 1
        return images, labels

    next_batch.calls = 0
    with pytest.raises(TrainingError, match=r"step 3: loss nan .* the images hold values that are not finite"):
        fit(network, next_batch, RECIPE)


def test_broken_weights_stop_the_training_and_are_named(network):
    with torch.no_grad():
        network.bias[0] = float("inf")
    with pytest.raises(TrainingError, match=r"step 1: .* the weights of bias"):
        fit(network, batches(), RECIPE)


def test_an_overflowing_output_stops_the_training_and_is_named():
    class Overflow(nn.Conv3d):
        def forward(self, x):
            return super().forward(x) * 1e38 * 1e38

    with pytest.raises(TrainingError, match="the network's output is not"):
        fit(Overflow(1, 3, 1), batches(), RECIPE)
