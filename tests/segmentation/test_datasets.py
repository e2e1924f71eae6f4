"""Finding and reading cases: the three kinds of data sets, and every way in which they may be wrong."""

import json

import nibabel
import numpy as np
import pytest
from segmentation.samples import AFFINE, SHAPE, save, volume, write_nnunet, write_pictures

from vssm.segmentation.datasets import read_dataset, split_folds
from vssm.segmentation.fingerprint import take_fingerprint
from vssm.segmentation.loading import load_case
from vssm.volumes import VolumeError


def edit(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_nnunet_folder_is_read_with_its_channels_and_labels(tmp_path):
    dataset = read_dataset(write_nnunet(tmp_path, cases=3, channels=2))
    assert [case.name for case in dataset.cases] == ["case0", "case1", "case2"]
    assert [path.name for path in dataset.cases[1].images] == ["case1_0000.nii.gz", "case1_0001.nii.gz"]
    assert dataset.labels == ("background", "ball", "box")
    loaded = load_case(dataset.cases[2], dataset)
    image, labels = volume(2)
    np.testing.assert_array_equal(loaded.image, np.stack([image, image + 1]))
    np.testing.assert_array_equal(loaded.labels, labels)


def test_a_decathlon_datalist_is_the_same_data(tmp_path):
    folder = write_nnunet(tmp_path, cases=2)
    same = read_dataset(folder)
    entries = [{"image": f"./imagesTr/case{n}_0000.nii.gz", "label": f"./labelsTr/case{n}.nii.gz"} for n in range(2)]
    content = {
        "modality": {"0": "MR"},
        "labels": {"0": "background", "1": "ball", "2": "box"},
        "training": entries,
        "test": [],
    }
    for path in (folder / "dataset.json", folder / "list.json"):
        path.write_text(json.dumps(content))
    for dataset in (read_dataset(folder), read_dataset(folder / "list.json")):
        assert (dataset.channels, dataset.labels) == (same.channels, same.labels)
        assert [case.name for case in dataset.cases] == [case.name for case in same.cases]
        assert dataset.cases[0].images[0].samefile(same.cases[0].images[0])


def test_plain_pairs_take_their_names_from_the_options(tmp_path):
    dataset = read_dataset(
        write_pictures(tmp_path), ("R", "G", "B"), {0: "skin", 1: "lesion"}, label_suffix="_segmentation"
    )
    assert dataset.is_pictures
    loaded = load_case(dataset.cases[0], dataset)
    assert loaded.image.shape == (3, 40, 48, 1)
    assert set(np.unique(loaded.labels)) == {0, 1}
    assert loaded.image[:, loaded.labels == 1].mean() < 100 < loaded.image[:, loaded.labels == 0].mean()


def test_folds_are_disjoint_complete_and_repeatable(tmp_path):
    cases = read_dataset(write_nnunet(tmp_path, cases=5)).cases
    parts = [split_folds(cases, 3, fold, seed=1) for fold in range(3)]
    held_out = [case.name for _, validation in parts for case in validation]
    assert sorted(held_out) == [case.name for case in cases]
    for training, validation in parts:
        assert {c.name for c in training} | {c.name for c in validation} == {c.name for c in cases}
        assert not {c.name for c in training} & {c.name for c in validation}
    assert parts == [split_folds(cases, 3, fold, seed=1) for fold in range(3)]
    assert split_folds(cases, 3, -1, seed=1) == (list(cases), list(cases))
    for folds, fold in ((6, 0), (3, 3), (1, 0)):
        with pytest.raises(VolumeError, match="fold"):
            split_folds(cases, folds, fold, seed=1)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / "labelsTr" / "case1.nii.gz").unlink(), "label map of case case1 is missing"),
        (lambda f: (f / "imagesTr" / "case1_0000.nii.gz").rename(f / "imagesTr" / "case1_0001.nii.gz"), "channel"),
        (lambda f: edit(f, channel_names={"0": "T1", "1": "T2"}), "_0001.nii.gz: the image of case case0 is missing"),
        (lambda f: edit(f, labels={"background": 0, "ball": 2}), "without gaps"),
        (lambda f: edit(f, labels={"background": 0, "whole": [1, 2]}), "regions"),
        (lambda f: edit(f, training=[{"image": 3}]), "training must list"),
        (lambda f: edit(f, channel_names=["T1"]), "channel_names must number"),
        (lambda f: (f / "dataset.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "dataset.json").unlink(), "names the labels"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_sentence(tmp_path, spoil, words):
    spoil(write_nnunet(tmp_path, cases=2))
    with pytest.raises(VolumeError, match=words) as caught:
        read_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(VolumeError, match="no such file or folder"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(VolumeError, match=r"neither dataset\.json nor the folders"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda f: save(np.full(SHAPE, 3, np.uint8), f / "labelsTr" / "case0.nii.gz"),
            "label 3, the dataset names 0 to 2",
        ),
        (lambda f: save(np.zeros((9, 9, 9), np.uint8), f / "labelsTr" / "case0.nii.gz"), "resample the one"),
        (
            lambda f: save(np.zeros(SHAPE, np.uint8), f / "labelsTr" / "case0.nii.gz", AFFINE + np.eye(4)),
            "mm apart in space",
        ),
        (lambda f: save(np.full(SHAPE, 0.5, np.float32), f / "labelsTr" / "case0.nii.gz"), "no labels"),
        (lambda f: (f / "imagesTr" / "case0_0000.nii.gz").write_bytes(b"x" * 99), "cannot be unpacked"),
    ],
)
def test_a_wrong_case_is_refused_in_one_sentence(tmp_path, spoil, words):
    dataset = read_dataset(write_nnunet(tmp_path, cases=1))
    spoil(tmp_path)
    with pytest.raises(VolumeError, match=words):
        load_case(dataset.cases[0], dataset)


def test_a_grey_picture_for_three_channels_is_refused(tmp_path):
    dataset = read_dataset(write_pictures(tmp_path), ("grey",), {0: "skin", 1: "lesion"}, "_segmentation")
    with pytest.raises(VolumeError, match="has 3 channels, the dataset 1"):
        load_case(dataset.cases[0], dataset)


def test_the_fingerprint_holds_sizes_spacings_and_the_intensities_of_labelled_voxels(tmp_path):
    folder = write_nnunet(tmp_path, cases=2)
    image, labels = volume(1)
    # the same case with its axes stored as top, right, front
    turned = AFFINE[:, [2, 0, 1, 3]]
    for array, path in ((image, "imagesTr/case1_0000.nii.gz"), (labels, "labelsTr/case1.nii.gz")):
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 0, 1), turned), folder / path)
    fingerprint = take_fingerprint(read_dataset(folder))
    assert fingerprint.shapes == [list(SHAPE)] * 2
    np.testing.assert_allclose(fingerprint.spacings, [[2, 2, 2.5]] * 2)
    labelled = np.concatenate([image[labels > 0] for image, labels in map(volume, range(2))])
    assert fingerprint.mean[0] == pytest.approx(labelled.mean(), rel=1e-5)
    assert fingerprint.std[0] == pytest.approx(labelled.std(), rel=1e-5)
    assert fingerprint.low[0] == pytest.approx(np.percentile(labelled, 0.5), rel=1e-5)
    assert fingerprint.label_cases == [2, 2, 2]
    assert fingerprint.zero_share == 0


def test_label_maps_of_background_only_are_refused(tmp_path):
    folder = write_nnunet(tmp_path, cases=1)
    save(np.zeros(SHAPE, np.uint8), folder / "labelsTr" / "case0.nii.gz")
    with pytest.raises(VolumeError, match="background only"):
        take_fingerprint(read_dataset(folder))
