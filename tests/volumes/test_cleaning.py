"""Connected components: what touches is one, each label is looked at alone, sizes are in millilitres."""

import numpy as np
import pytest

from vssm.volumes.cleaning import clean_labels


@pytest.fixture
def labels():
    """Label 1 in parts of 8, 3 (joined at corners) and 1 voxels, label 3 in one of 2 that touches the first."""
    labels = np.zeros((10, 9, 8), np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    labels[3, 1, 1:3] = 3
    for step in range(3):
        labels[6 + step, 5 + step, 4 + step] = 1
    labels[0, 8, 0] = 1
    return labels


def sizes(labels):
    return [int((labels == label).sum()) for label in (1, 3)]


def test_the_largest_component_of_each_label_is_kept(labels):
    before = labels.copy()
    assert clean_labels(labels, 0.5, keep_largest=True) == 4
    assert sizes(labels) == [8, 2]
    np.testing.assert_array_equal(labels[:5, :5], before[:5, :5])


@pytest.mark.parametrize(
    "smallest, left", [(0.0, [12, 2]), (0.5, [12, 2]), (0.6, [11, 2]), (1.5, [11, 0]), (1.6, [8, 0]), (4.1, [0, 0])]
)
def test_components_below_a_volume_are_removed(labels, smallest, left):
    removed = clean_labels(labels, 0.5, min_size_ml=smallest)
    assert sizes(labels) == left
    assert removed == 14 - sum(left)


def test_both_together_leave_nothing_of_a_label_that_is_small_everywhere(labels):
    clean_labels(labels, 0.5, keep_largest=True, min_size_ml=2.0)
    assert sizes(labels) == [8, 0]


def test_an_empty_map_stays_empty():
    labels = np.zeros((3, 4, 5), np.uint8)
    assert clean_labels(labels, 1.0, keep_largest=True, min_size_ml=1.0) == 0
    assert not labels.any()
