"""Simulated scans follow BrainWeb's definitions, and each side of the template stays on its side."""

import math

import nibabel
import numpy as np
import pytest
import torch

from vssm.volumes import VolumeError
from vssm.volumes.phantom import add_rician_noise, load_phantom, nonuniformity_field, simulate_scan

LEFT = [[-200, 0], [-200, 200], [-200, 200]]
RIGHT = [[0, 200], [-200, 200], [-200, 200]]


@pytest.fixture(scope="module")
def phantom():
    return load_phantom(resolution_mm=4)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def ball():
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in (24, 30, 27)), indexing="ij")
    return sum(axis**2 for axis in axes) < 0.8


def test_tissues_have_the_labels_and_the_t1_order_of_intensities(phantom):
    fluid, grey, white = (phantom.intensity[phantom.labels == label].mean().item() for label in range(3))
    assert fluid < grey < white
    assert white == pytest.approx(phantom.brightest)
    assert phantom.labels.unique().tolist() == [0, 1, 2]


def test_the_template_is_mirror_symmetric_as_the_card_says(phantom):
    torch.testing.assert_close(phantom.intensity, phantom.intensity.flip(0), atol=1e-6, rtol=0)
    assert nibabel.aff2axcodes(phantom.image.affine) == ("R", "A", "S")


def test_left_and_right_boxes_share_no_voxel_and_leave_out_the_midline(phantom):
    origin, step = phantom.image.affine[0, 3], phantom.image.affine[0, 0]
    left, right = (phantom.box(box)[0] for box in (LEFT, RIGHT))
    assert origin + step * (left.stop - 1) < 0 < origin + step * right.start
    assert (left.start, right.stop) == (0, phantom.labels.shape[0])
    assert right.start - left.stop <= 1


def test_a_box_without_voxels_is_refused(phantom):
    with pytest.raises(VolumeError, match="holds no voxel"):
        phantom.box([[300, 400], [-200, 200], [-200, 200]])


@pytest.mark.parametrize("strength", [0.0, 0.2, 0.4])
def test_the_field_spans_exactly_its_strength_over_the_brain(ball, generator, strength):
    for _ in range(5):
        field = nonuniformity_field(ball, strength, generator)
        low, high = field[ball].aminmax()
        assert low.item() == pytest.approx(1 - strength / 2, abs=1e-6)
        assert high.item() == pytest.approx(1 + strength / 2, abs=1e-6)


def test_the_field_is_smooth(ball, generator):
    field = nonuniformity_field(ball, 0.4, generator)
    for axis in range(3):
        # the steepest wave of degree 3 with its neighbours stays below a tenth of the range per voxel
        assert field.diff(dim=axis).abs().max() < 0.06


def test_noise_is_rician(generator):
    dark = add_rician_noise(torch.zeros(200_000), 0.5, generator)
    assert dark.min() >= 0
    assert dark.mean().item() == pytest.approx(0.5 * math.sqrt(math.pi / 2), rel=0.01)
    assert dark.square().mean().item() == pytest.approx(2 * 0.5**2, rel=0.01)
    bright = add_rician_noise(torch.full((200_000,), 10.0), 0.5, generator)
    assert bright.std().item() == pytest.approx(0.5, rel=0.01)
    assert bright.square().mean().item() == pytest.approx(10**2 + 2 * 0.5**2, rel=0.001)


def test_noise_is_a_fraction_of_white_matter(phantom, generator):
    scan = simulate_scan(phantom.intensity, phantom.brightest, 0.09, 0.0, generator)
    outside = phantom.intensity == 0
    expected = math.sqrt(2) * 0.09 * phantom.brightest
    assert scan[outside].square().mean().sqrt().item() == pytest.approx(expected, rel=0.02)


def test_equal_generators_give_equal_scans_and_each_draw_is_another_patient(phantom):
    first, again = (torch.Generator().manual_seed(3) for _ in range(2))
    arguments = (phantom.intensity, phantom.brightest, 0.05, 0.3)
    one, same, other = (simulate_scan(*arguments, generator) for generator in (first, again, first))
    torch.testing.assert_close(one, same, atol=0, rtol=0)
    assert not torch.allclose(one, other, atol=0.01)


def test_a_scan_without_degradation_is_the_template(phantom, generator):
    scan = simulate_scan(phantom.intensity, phantom.brightest, 0.0, 0.0, generator)
    np.testing.assert_allclose(scan, phantom.intensity, atol=1e-6)
