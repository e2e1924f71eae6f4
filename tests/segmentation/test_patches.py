"""Prepared cases and patches: the right voxels, the promised share of foreground, labels that stay on their image."""

import dataclasses
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from segmentation.samples import AFFINE, save, volume, write_nnunet

from vssm.segmentation.augmentation import Augmentation
from vssm.segmentation.datasets import read_dataset
from vssm.segmentation.patches import PatchDataset
from vssm.segmentation.planning import Plan
from vssm.segmentation.preparing import prepare_cases

PLAN = Plan(
    spacing=[2.0, 2.0, 2.5],
    resize=[0, 0, 0],
    patch_size=[8, 10, 6],
    batch_size=2,
    normalisation="dataset",
    intensity_mean=[100.0],
    intensity_std=[20.0],
    intensity_low=[50.0],
    intensity_high=[170.0],
    features=[4, 8],
    strides=[[1, 1, 1], [2, 2, 2]],
    kernel_sizes=[[3, 3, 3], [3, 3, 3]],
    num_blocks=[1, 1],
    num_decoder_blocks=[1],
)


@pytest.fixture
def prepare(tmp_path):
    """prepare(plan) -> prepared cases of a folder of two."""
    write_nnunet(tmp_path / "raw", cases=2)

    def run(plan=PLAN):
        dataset = read_dataset(tmp_path / "raw")
        return prepare_cases(dataset.cases, dataset, plan, tmp_path / "cache")

    return run


@pytest.mark.parametrize(
    "normalisation, expected",
    [
        ("dataset", lambda image: (image - 100) / 20),
        ("ct", lambda image: (image.clip(50, 170) - 100) / 20),
        ("zscore", lambda image: (image - image.mean()) / image.std()),
    ],
)
def test_intensities_are_what_the_plan_says(prepare, normalisation, expected):
    case = prepare(dataclasses.replace(PLAN, normalisation=normalisation))[1]
    image, labels = volume(1)
    np.testing.assert_allclose(case.image[0], expected(image.astype(np.float64)), atol=1e-4)
    np.testing.assert_array_equal(case.labels, labels)
    for label, voxels in case.centres.items():
        assert (labels[tuple(voxels.T)] == label).all()


def test_cases_are_turned_to_ras_and_resampled_together(prepare, tmp_path):
    image, labels = volume(1)
    # left, back: both axes run the other way
    turned = AFFINE @ np.diag([-1.0, -1.0, 1.0, 1.0])
    for array, path in ((image, "imagesTr/case1_0000.nii.gz"), (labels, "labelsTr/case1.nii.gz")):
        save(array, tmp_path / "raw" / path, turned)
    same = prepare()[1]
    np.testing.assert_array_equal(same.labels, labels[::-1, ::-1])
    coarse = prepare(dataclasses.replace(PLAN, spacing=[4.0, 4.0, 5.0]))[1]
    assert coarse.image.shape[1:] == coarse.labels.shape
    # half of (20, 18, 14); MONAI counts from the middles of the outer voxels
    assert np.abs(np.array(coarse.labels.shape) - (10, 9, 7)).max() <= 1
    assert coarse.image[0][coarse.labels == 1].mean() > coarse.image[0][coarse.labels == 0].mean() + 2


def test_the_cache_is_used_until_a_file_changes(prepare, tmp_path):
    folders = [case.folder for case in prepare()]
    times = [folder.stat().st_mtime_ns for folder in folders]
    assert [case.folder.stat().st_mtime_ns for case in prepare()] == times
    path = tmp_path / "raw" / "imagesTr" / "case0_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume(0)[0] + 1, AFFINE), path)
    assert [case.folder == folder for case, folder in zip(prepare(), folders, strict=True)] == [False, True]


def test_a_patch_is_a_piece_of_its_case_and_the_same_each_time(prepare):
    cases = {case.name: case for case in prepare()}
    patches = PatchDataset(cases.values(), PLAN, 3, 0.5, None)
    names = set()
    for index in range(12):
        image, labels, name = patches[index]
        again = patches[index]
        assert torch.equal(image, again[0])
        assert torch.equal(labels, again[1])
        names.add(name)
        windows = np.lib.stride_tricks.sliding_window_view(cases[name].image[0], PLAN.patch_size)
        (place,) = np.argwhere((windows == image[0].numpy()).all(axis=(3, 4, 5)))
        part = tuple(slice(start, start + side) for start, side in zip(place, PLAN.patch_size, strict=True))
        np.testing.assert_array_equal(labels[0], cases[name].labels[part])
    assert names == {"case0", "case1"}


def test_the_share_of_forced_patches_holds_foreground(prepare):
    patches = PatchDataset(prepare(), dataclasses.replace(PLAN, patch_size=[4, 4, 4]), 0, 0.25, None)
    forced = [patches[index][1].any().item() for index in range(3, 80, 4)]
    free = [patches[index][1].any().item() for index in range(80) if index % 4 != 3]
    assert all(forced)
    assert np.mean(free) < 0.8


def test_small_cases_lie_in_the_middle_of_larger_patches(prepare):
    plan = dataclasses.replace(PLAN, patch_size=[24, 18, 14])
    image, labels, name = PatchDataset(prepare(), plan, 0, 1.0, None)[0]
    assert image.shape == (1, 24, 18, 14)
    assert not image[:, :2].any()
    assert not image[:, -2:].any()
    expected = volume(int(name[-1]))[1]
    np.testing.assert_array_equal(labels[0, 2:-2], expected)


def sizes(*patch):
    flat = patch[2] == 1
    network = list(patch[:2] if flat else patch)
    return SimpleNamespace(patch_size=list(patch), network_size=network, spatial_dims=len(network), is_flat=flat)


@pytest.mark.parametrize(
    "kind, patch",
    [("nnunet", (16, 16, 16)), ("nnunet", (24, 24, 4)), ("nnunet", (24, 24, 1)), ("pictures", (24, 24, 1))],
)
def test_labels_stay_on_their_image(kind, patch):
    augmentation = Augmentation(kind, sizes(*patch), [0, 1, 2])
    piece = augmentation.piece_size[: 2 if patch[2] == 1 else 3]
    # a bright block off the middle
    labels = torch.zeros(1, *piece, dtype=torch.long)
    labels[(0, *(slice(side // 2 - 1, side * 3 // 4) for side in piece))] = 1
    moved = 0
    for seed in range(40):
        image, changed = augmentation(labels.float() * 100, labels, seed)
        assert image.shape == changed.shape == (1, *patch[: len(piece)])
        assert (image.dtype, changed.dtype) == (torch.float32, torch.int64)
        assert set(changed.unique().tolist()) <= {0, 1}
        if changed.any():
            inside, outside = image[changed == 1].mean(), image[changed == 0].mean()
            assert inside > outside + 30
        moved += not torch.equal(changed, augmentation(labels.float(), labels, 0)[1])
    assert moved > 10


def test_the_same_seed_gives_the_same_and_another_seed_another_patch():
    augmentation = Augmentation("nnunet", sizes(12, 12, 12), [0])
    image = torch.randn(2, *augmentation.piece_size)
    labels = torch.randint(0, 3, (1, *augmentation.piece_size))
    one, two, other = (augmentation(image, labels, seed) for seed in (5, 5, 6))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_flips_are_along_the_axes_asked_for():
    augmentation = Augmentation("flips", sizes(2, 3, 4), [1])
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    seen = {tuple(augmentation(image, image.long(), seed)[0].flatten().tolist()) for seed in range(20)}
    assert seen == {tuple(image.flatten().tolist()), tuple(image.flip(2).flatten().tolist())}


def test_pictures_need_flat_patches():
    with pytest.raises(ValueError, match="needs 2-D patches"):
        Augmentation("pictures", sizes(8, 8, 8), [])
