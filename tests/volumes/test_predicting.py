"""Prediction depends on what is in the volume, not on how its voxels are stored, and comes back on the same voxels."""

import itertools
import re

import numpy as np
import pytest
import torch
from monai.transforms import NormalizeIntensityd, Orientationd, Spacingd
from torch import nn

from vssm.volumes import Bundle, VolumeError, memory, mismatches, predict_volume, predicting, read_volume

OBLIQUE = np.array([[-1.9, 0.3, 0.2, 0], [0.25, 1.4, -0.5, 0], [0.15, 0.4, 2.8, 0], [0, 0, 0, 1.0]])
ANISOTROPIC = np.diag([0.8, 0.8, 5.0, 1.0])
FINE = np.diag([-0.7, -0.9, 0.8, 1.0])
FLIPPED = np.array([[0, 0, 2.0, 0], [-2.0, 0, 0, 0], [0, -2.0, 0, 0], [0, 0, 0, 1]])


class Above(nn.Module):
    """Label 1 where the grey value is above zero; the logits are linear in it."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return torch.cat([-x, x], dim=1)


class Direction(nn.Module):
    """Label 1, 2 or 3 where the grey value grows along the first, second or third axis of the network's grid."""

    def forward(self, x):
        steps = torch.gradient(x, dim=(2, 3, 4))
        return torch.cat([torch.zeros_like(x), *steps], dim=1)


def bundle(network, spacing=2.0, size=16, labels=("background", "inside"), **options):
    steps = (
        Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        Spacingd("image", pixdim=[spacing] * 3),
    )
    window = {"roi_size": [size] * 3, "overlap": 0.5, "mode": "gaussian", "padding_mode": "replicate"}
    return Bundle("test", network, options.pop("preprocessing", steps), window, labels, **options)


def grid(shape, affine):
    """(X, Y, Z, 3) positions in mm of the voxels, the middle of the volume at the origin, and that affine."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    affine = affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return index @ affine[:3, :3].T + affine[:3, 3], affine


def ball(shape, affine):
    """Grey values that fall from 14 in the middle of a ball by 1 per mm, and the affine."""
    position, affine = grid(shape, affine)
    return (14 - np.linalg.norm(position - [2, -3, 1], axis=-1)).astype(np.float32), affine


@pytest.mark.parametrize(
    "shape, affine",
    [((24, 30, 16), OBLIQUE), ((48, 44, 9), ANISOTROPIC), ((50, 40, 46), FINE), ((20, 21, 22), FLIPPED)],
    ids=["oblique", "anisotropic", "fine", "flipped"],
)
def test_labels_come_back_on_the_voxels_they_belong_to(save, shape, affine):
    grey, affine = ball(shape, affine)
    labels = predict_volume(read_volume(save(grey, affine)), bundle(Above()))
    assert labels.shape == shape
    assert labels.dtype == np.uint8
    # interpolation there and back may move the surface by a part of the network's 2 mm, nothing else
    surely = np.abs(grey) > 1.0
    np.testing.assert_array_equal(labels[surely], grey[surely] > 0)
    assert (labels == (grey > 0)).mean() > 0.99


def test_logits_not_labels_are_interpolated(save):
    """From 4 mm back to 0.8 mm: labels brought back by the nearest voxel would be off by up to 3 mm."""
    grey, affine = ball((50, 40, 46), FINE)
    labels = predict_volume(read_volume(save(grey, affine)), bundle(Above(), spacing=4.0))
    surely = np.abs(grey) > 1.0
    np.testing.assert_array_equal(labels[surely], grey[surely] > 0)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)), ids=str)
@pytest.mark.parametrize("along", range(3), ids=["right", "front", "head"])
def test_the_network_sees_right_front_head_however_the_voxels_are_stored(save, axes, signs, along):
    affine = np.eye(4)
    affine[:3, :3] = 0
    affine[list(axes), range(3)] = np.array(signs) * (2.0, 3.0, 2.5)
    position, affine = grid((9, 8, 10), affine)
    grey = position[..., along].astype(np.float32)
    labels = predict_volume(
        read_volume(save(grey, affine, "a.nii")), bundle(Direction(), labels=("none", "right", "front", "head"))
    )
    assert (labels[2:-2, 2:-2, 2:-2] == along + 1).all()


def test_without_resampling_the_labels_are_exactly_the_networks(save, rng):
    grey = rng.standard_normal((14, 15, 13)).astype(np.float32)
    for affine in (np.diag([2, 2, 2, 1.0]), FLIPPED):
        labels = predict_volume(read_volume(save(grey, affine)), bundle(Above()))
        np.testing.assert_array_equal(labels, grey > 0)


def test_a_far_origin_changes_nothing(save):
    grey, affine = ball((24, 30, 16), OBLIQUE)
    near = predict_volume(read_volume(save(grey, affine)), bundle(Above()))
    affine[:3, 3] = 1e30
    np.testing.assert_array_equal(predict_volume(read_volume(save(grey, affine)), bundle(Above())), near)


def test_a_volume_smaller_than_a_window_is_padded(save):
    network = Above()
    grey = np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    labels = predict_volume(read_volume(save(grey, np.diag([2, 2, 2, 1.0]))), bundle(network))
    np.testing.assert_array_equal(labels, grey > 0)
    assert network.sizes == [(16, 16, 16)]


@pytest.mark.parametrize("shape", [(20, 18, 1), (1, 20, 18), (20, 1, 18), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("affine", [ANISOTROPIC, OBLIQUE, FINE], ids=["anisotropic", "oblique", "fine"])
def test_a_single_slice_is_segmented(save, shape, affine):
    grey, affine = ball(shape, affine)
    labels = predict_volume(read_volume(save(grey, affine)), bundle(Above()))
    surely = np.abs(grey) > 1.5
    np.testing.assert_array_equal(labels[surely], grey[surely] > 0)


def test_a_constant_volume_gives_a_result_without_a_division_by_zero(save):
    steps = (*bundle(None).preprocessing, NormalizeIntensityd("image"))
    constant = read_volume(save(np.full((9, 8, 7), 300, np.int16)))
    assert predict_volume(constant, bundle(Above(), preprocessing=steps)).shape == (9, 8, 7)


def test_every_voxel_gets_the_same_label_whatever_the_overlap(save):
    grey, affine = ball((48, 48, 48), np.diag([2, 2, 2, 1.0]))
    volume = read_volume(save(grey, affine))
    results, windows = [], []
    for overlap in (0.0, 0.5, 0.75):
        network = Above()
        results.append(predict_volume(volume, bundle(network), overlap=overlap))
        windows.append(len(network.sizes))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert windows == sorted(set(windows))


def test_window_seams_are_blended_by_a_gaussian(save):
    """Where one window sees a voxel in its middle and the next at its border, the first decides."""

    class Middle(nn.Module):
        def forward(self, x):
            middle = torch.zeros_like(x)
            middle[:, :, 4:12] = 1
            return torch.cat([0.5 - middle, middle - 0.5], dim=1)

    volume = read_volume(save(np.arange(32 * 16 * 16.0).reshape(32, 16, 16), np.diag([2, 2, 2, 1.0])))
    labels = predict_volume(volume, bundle(Middle()))
    # windows begin at 0, 8 and 16; with equal weights their votes would be even, and label 0 would win;
    # far from the windows' axis all weights are MONAI's smallest
    assert labels[4:28, 4:12, 4:12].all()
    assert not labels[:4].any()
    assert not labels[28:].any()


def test_two_runs_give_the_same_labels(save, rng):
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 3, padding=1)
    volume = read_volume(save(rng.standard_normal((20, 30, 25)).astype(np.float32)))
    first, second = (predict_volume(volume, bundle(network)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert 0 < first.mean() < 1


def test_cutting_the_way_back_into_slabs_changes_nothing(save, monkeypatch):
    volume = read_volume(save(*ball((24, 30, 16), OBLIQUE)))
    whole = predict_volume(volume, bundle(Above()))
    monkeypatch.setattr(predicting, "_SLAB_VALUES", 3000)
    np.testing.assert_array_equal(predict_volume(volume, bundle(Above())), whole)


def test_prediction_leaves_the_volume_and_the_network_as_they_were(save):
    volume = read_volume(save(*ball((12, 12, 12), OBLIQUE)))
    network = nn.Conv3d(1, 2, 1)
    voxels, weight = volume.voxels.copy(), network.weight.detach().clone()
    predict_volume(volume, bundle(network))
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert torch.equal(network.weight, weight)
    assert network.weight.grad is None


@pytest.mark.parametrize("device", ["tpu9", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(save, device):
    volume = read_volume(save(*ball((4, 4, 4), OBLIQUE)))
    with pytest.raises(VolumeError, match=f"device '{device}'"):
        predict_volume(volume, bundle(Above()), device=device)


@pytest.mark.parametrize("overlap", [-0.1, 1.0, float("nan")])
def test_an_overlap_out_of_range_is_refused(save, overlap):
    with pytest.raises(VolumeError, match="overlap must be"):
        predict_volume(read_volume(save(*ball((4, 4, 4), OBLIQUE))), bundle(Above()), overlap=overlap)


def test_a_prediction_larger_than_the_memory_is_refused_before_it_starts(save, monkeypatch):
    network = Above()
    volume = read_volume(save(*ball((6, 6, 6), np.diag([90, 90, 90, 1.0]))))
    # 450 mm a side at 0.1 mm would be 9e10 voxels
    with pytest.raises(VolumeError, match="of memory"):
        predict_volume(volume, bundle(network, spacing=0.1))
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    with pytest.raises(VolumeError, match=r"image.nii.gz: prediction on .* million voxels needs"):
        predict_volume(volume, bundle(network))
    assert network.sizes == []


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda y: y[:, :1], "(1, 1, 16, 16, 16)"),
        (lambda y: y[..., ::2, ::2, ::2], "(1, 2, 8, 8, 8)"),
        (lambda y: (y, y), "tuple"),
    ],
    ids=["channels", "size", "several"],
)
def test_a_network_that_returns_anything_but_one_channel_per_label_is_refused(save, change, found):
    class Other(Above):
        def forward(self, x):
            return change(super().forward(x))

    volume = read_volume(save(*ball((16, 16, 16), np.diag([2, 2, 2, 1.0]))))
    with pytest.raises(VolumeError, match=re.escape(f"got {found}")):
        predict_volume(volume, bundle(Other()))


def test_a_network_that_cannot_take_the_windows_is_named_with_its_reason(save):
    class Picky(nn.Module):
        def forward(self, x):
            raise ValueError("sizes must be divisible by 5")

    with pytest.raises(VolumeError, match=r"failed on a window of \[16, 16, 16\] \(sizes must be divisible by 5\)"):
        predict_volume(read_volume(save(*ball((6, 6, 6), OBLIQUE))), bundle(Picky()))


def test_values_that_are_not_finite_never_become_labels(save):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.cat([x, x / 0], dim=1)

    with pytest.raises(VolumeError, match="not finite"):
        predict_volume(read_volume(save(*ball((6, 6, 6), OBLIQUE))), bundle(Broken()))


def test_a_volume_unlike_what_was_learned_from_is_reported(save):
    learned = bundle(Above(), field_of_view_mm=(180.0, 220.0, 180.0))
    alike = read_volume(save(np.zeros((100, 110, 90)), np.diag([-1.8, 2.0, 2.0, 1])))
    assert mismatches(alike, learned) == []
    small = read_volume(save(np.zeros((30, 110, 90)), np.diag([2, 2.0, 2.0, 1])))
    assert mismatches(small, learned) == [
        "the volume covers 60 x 220 x 180 mm, test learned from 180 x 220 x 180 mm; the result may be meaningless"
    ]
    turned = read_volume(save(np.zeros((90, 100, 110)), FLIPPED))
    assert mismatches(turned, bundle(Above(), field_of_view_mm=(220.0, 180.0, 200.0))) == []
    cube = np.zeros((100, 110, 90), np.float32)
    cube[20:60, 20:70, 20:60] = 1
    head = read_volume(save(cube, np.diag([2, 2.0, 2.0, 1])))
    assert mismatches(head, bundle(Above(), foreground_ml=700.0)) == []
    for learned_ml in (400.0, 1500.0):
        (note,) = mismatches(head, bundle(Above(), foreground_ml=learned_ml))
        assert f"640 ml of the volume are bright, test learned from {learned_ml:.0f} ml" in note
    coarse = read_volume(save(np.zeros((100, 110, 20)), np.diag([1.8, 2.0, 9.0, 1])))
    assert mismatches(coarse, learned) == ["voxels are up to 9.0 mm long, test works at 2.0 mm"]


@pytest.mark.parametrize(
    "step, words",
    [
        (lambda data: {"image": data["image"] * 1e38 * 1e38}, "too large to be prepared for bundle test"),
        (lambda data: data["image"].view(7), "cannot be prepared for bundle test"),
    ],
    ids=["overflow", "failure"],
)
def test_voxels_that_cannot_be_prepared_are_named_with_their_file(save, step, words):
    path = save(*ball((6, 6, 6), OBLIQUE))
    with pytest.raises(VolumeError, match=rf"{re.escape(str(path))}: .*{words}"):
        predict_volume(read_volume(path), bundle(Above(), preprocessing=(*bundle(None).preprocessing, step)))


@pytest.mark.parametrize("patch_size", [(16, 16), (0, 16, 16), (16, 16, 16, 16)], ids=str)
def test_a_patch_size_that_is_no_window_is_refused(save, patch_size):
    with pytest.raises(VolumeError, match="three positive numbers"):
        predict_volume(read_volume(save(*ball((4, 4, 4), OBLIQUE))), bundle(Above()), patch_size=patch_size)


def test_the_patch_size_replaces_the_bundles(save):
    network = Above()
    predict_volume(read_volume(save(*ball((12, 12, 12), OBLIQUE))), bundle(network), patch_size=(8, 12, 10))
    assert set(network.sizes) == {(8, 12, 10)}


def test_the_networks_channels_are_the_volumes_in_their_order(save, rng):
    class First(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0] + 0 * x[:, 1]], dim=1)

    greys = rng.standard_normal((2, 6, 7, 8)).astype(np.float32)
    volumes = [read_volume(save(grey, np.diag([2, 2, 2, 1.0]), f"{place}.nii")) for place, grey in enumerate(greys)]
    labels = predict_volume(volumes, bundle(First(), in_channels=2))
    np.testing.assert_array_equal(labels, greys[0] > 0)
