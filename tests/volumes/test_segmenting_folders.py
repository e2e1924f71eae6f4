"""Folders, ensembles, several channels, clean-up and probabilities, from files to files."""

import errno
import itertools
import os
from collections.abc import Iterator

import nibabel
import numpy as np
import pytest
from volumes.samples import write_bundle

from vssm.volumes import (
    VolumeError,
    load_bundle,
    memory,
    predict_volume,
    predicting,
    read_volume,
    segment_file,
    segment_folder,
    segmenting,
)
from vssm.volumes.cleaning import clean_labels


@pytest.fixture
def scans(tmp_path, rng):
    """A folder with the volumes a, b and c on three grids."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, shape in (("a", (9, 8, 7)), ("b", (12, 11, 10)), ("c", (7, 9, 11))):
        voxels = rng.integers(0, 1000, shape).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.5, 2, 2.5, 1])), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def folds(tmp_path):
    """Two bundles of different weights."""
    return [write_bundle(tmp_path / f"fold{seed}", seed=seed) for seed in (1, 2)]


def segment(scans, output, **options) -> list:
    results = segment_folder(scans, output, **options)
    assert isinstance(results, Iterator)
    return list(results)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def probabilities(path):
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def test_every_volume_of_a_folder_gets_the_result_it_gets_alone(scans, bundle_folder, tmp_path):
    results = segment(scans, tmp_path / "out", bundle=bundle_folder)
    assert [result.name for result in results] == ["a", "b", "c"]
    for result in results:
        assert (result.problem, result.output) == (None, tmp_path / "out" / f"{result.name}.nii.gz")
        alone = segment_file(scans / f"{result.name}.nii.gz", tmp_path / "alone.nii.gz", bundle=bundle_folder)
        assert result.segmentation == alone
        assert result.output.read_bytes() == (tmp_path / "alone.nii.gz").read_bytes()


def test_a_run_that_was_stopped_goes_on_where_it_stopped(scans, bundle_folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    segment(scans, whole, bundle=bundle_folder)
    output = tmp_path / "out"
    write = segmenting.write_labels

    def interrupted(labels, volume, path, description):
        if path.name == "b.nii.gz":
            raise KeyboardInterrupt
        write(labels, volume, path, description)

    monkeypatch.setattr(segmenting, "write_labels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        segment(scans, output, bundle=bundle_folder)
    assert os.listdir(output) == ["a.nii.gz"]
    monkeypatch.setattr(segmenting, "write_labels", write)
    before = (output / "a.nii.gz").stat().st_mtime_ns
    results = segment(scans, output, bundle=bundle_folder)
    assert [result.segmentation is None for result in results] == [True, False, False]
    assert all(result.problem is None for result in results)
    assert (output / "a.nii.gz").stat().st_mtime_ns == before
    assert content(output) == content(whole)
    # the device is no setting: it does not change what a result means
    assert all(r.segmentation is None for r in segment(scans, output, bundle=bundle_folder, device="cpu"))


def test_a_damaged_result_is_made_again(scans, bundle_folder, tmp_path):
    output = tmp_path / "out"
    segment(scans, output, bundle=bundle_folder)
    whole = content(output)
    (output / "b.nii.gz").write_bytes(whole["b.nii.gz"][:-9])
    results = segment(scans, output, bundle=bundle_folder)
    assert [result.segmentation is None for result in results] == [True, False, True]
    assert content(output) == whole


def test_probabilities_that_are_missing_or_older_are_made_again(scans, bundle_folder, tmp_path):
    output = tmp_path / "out"
    options = {"bundle": bundle_folder, "save_probabilities": True}
    segment(scans, output, bundle=bundle_folder)
    assert all(result.segmentation is not None for result in segment(scans, output, **options))
    whole = content(output)
    assert all(result.segmentation is None for result in segment(scans, output, **options))
    (output / "a.npz").unlink()
    (output / "b.npz").write_bytes(whole["b.npz"][:100])
    (output / "c.npz").write_bytes(whole["a.npz"])
    assert all(result.segmentation is not None for result in segment(scans, output, **options))
    assert content(output) == whole


@pytest.mark.parametrize("changed", ["image", "bundle", "settings", "foreign"])
def test_a_result_of_something_else_is_kept_unless_it_may_be_overwritten(
    scans, bundle_folder, folds, tmp_path, changed
):
    output, options = tmp_path / "out", {"bundle": bundle_folder}
    segment(scans, output, **options)
    if changed == "image":
        stored = nibabel.load(scans / "b.nii.gz")
        nibabel.save(nibabel.Nifti1Image(stored.get_fdata() + 1, stored.affine), scans / "b.nii.gz")
    elif changed == "bundle":
        options["bundle"] = folds[0]
    elif changed == "settings":
        options["overlap"] = 0.25
    else:
        (output / "b.nii.gz").write_bytes((scans / "b.nii.gz").read_bytes())
    before = content(output)
    results = {result.name: result for result in segment(scans, output, **options)}
    assert "was made from other images, bundles or settings; add --overwrite" in results["b"].problem
    assert (results["a"].problem is None) == (changed in ("image", "foreign"))
    assert content(output) == before
    redone = segment(scans, output, overwrite=True, **options)
    assert all(result.problem is None and result.segmentation is not None for result in redone)
    assert all(result.segmentation is None for result in segment(scans, output, **options))


def test_a_case_that_cannot_be_segmented_does_not_stop_the_others(scans, bundle_folder, tmp_path):
    (scans / "b.nii.gz").write_bytes((scans / "b.nii.gz").read_bytes()[:-20])
    results = segment(scans, tmp_path / "out", bundle=bundle_folder)
    assert [result.problem is None for result in results] == [True, False, True]
    assert str(scans / "b.nii.gz") in results[1].problem
    assert sorted(os.listdir(tmp_path / "out")) == ["a.nii.gz", "c.nii.gz"]


def test_folders_that_cannot_be_used_are_refused_before_any_work(scans, bundle_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for folder, output, words in (
        (scans, scans, "is the folder of the images"),
        (scans, tmp_path / "file", "is a file"),
        (scans, tmp_path / "none" / "out", "cannot be made"),
        (tmp_path / "empty", tmp_path / "out", "holds no .nii"),
        (tmp_path / "none", tmp_path / "out", "cannot be read"),
    ):
        with pytest.raises(VolumeError, match=words):
            segment(folder, output, bundle=bundle_folder)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_result_and_no_part_of_one(scans, bundle_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    results = segment(scans, tmp_path / "out", bundle=bundle_folder, save_probabilities=True)
    assert all("No space left on device); free some space" in result.problem for result in results)
    assert os.listdir(tmp_path / "out") == []


def exhausted(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")


@pytest.mark.parametrize("place", ["mismatches", "clean_labels", "write_labels"])
def test_memory_that_runs_out_at_any_step_is_a_problem_of_that_case(scans, bundle_folder, tmp_path, monkeypatch, place):
    monkeypatch.setattr(segmenting, place, exhausted)
    options = {"bundle": bundle_folder, "min_size_ml": 0.1}
    for result in segment(scans, tmp_path / "out", **options):
        assert f"{result.name}.nii.gz does not fit into memory" in result.problem
    with pytest.raises(VolumeError, match="does not fit into memory; crop the volume"):
        segment_file(scans / "a.nii.gz", tmp_path / "out.nii.gz", **options)
    assert os.listdir(tmp_path / "out") == []


def test_a_fault_of_the_program_is_no_problem_of_a_case(scans, bundle_folder, tmp_path, monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr(segmenting, "mismatches", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        segment(scans, tmp_path / "out", bundle=bundle_folder)


def test_an_ensemble_averages_the_probabilities_of_its_folds(scans, folds, tmp_path):
    for name, bundle in (("one", folds[0]), ("two", folds[1]), ("both", folds)):
        segment_file(scans / "b.nii.gz", tmp_path / f"{name}.nii.gz", bundle=bundle, save_probabilities=True)
    one, two, both = (probabilities(tmp_path / f"{name}.npz")["probabilities"] for name in ("one", "two", "both"))
    # three numbers rounded to 11 bits
    np.testing.assert_allclose(both, (one.astype(float) + two) / 2, atol=2**-11)
    assert not np.allclose(one, two, atol=0.01)
    labels = read_volume(tmp_path / "both.nii.gz").voxels
    volume, bundles = read_volume(scans / "b.nii.gz"), [load_bundle(fold) for fold in folds]
    exact = np.zeros((3, *volume.voxels.shape))
    np.testing.assert_array_equal(predict_volume(volume, bundles, probabilities=exact), labels)
    np.testing.assert_array_equal(exact.argmax(0), labels)


def test_probabilities_are_half_precision_with_their_place_and_names(scans, bundle_folder, tmp_path):
    segment_file(scans / "a.nii.gz", tmp_path / "plain.nii.gz", bundle=bundle_folder)
    segment_file(scans / "a.nii.gz", tmp_path / "out.nii.gz", bundle=bundle_folder, save_probabilities=True)
    assert (tmp_path / "plain.nii.gz").read_bytes() == (tmp_path / "out.nii.gz").read_bytes()
    stored = probabilities(tmp_path / "out.npz")
    values = stored["probabilities"]
    assert (values.dtype, values.shape) == (np.float16, (3, 9, 8, 7))
    np.testing.assert_allclose(values.astype(float).sum(0), 1, atol=2e-3)
    np.testing.assert_array_equal(stored["affine"], nibabel.load(scans / "a.nii.gz").affine)
    assert stored["labels"].tolist() == ["background", "grey matter", "white matter"]
    labels = read_volume(tmp_path / "out.nii.gz").voxels.astype(int)
    # no other label is more probable; equal after rounding is possible
    np.testing.assert_array_equal(np.take_along_axis(values, labels[None], 0)[0], values.max(0))


def test_mirroring_gives_the_mirrored_body_the_mirrored_labels(bundle_folder, tmp_path, save, rng):
    # one window is the whole of it, so that nothing but the network knows left from right
    voxels, affine = rng.integers(0, 1000, (16, 16, 16)).astype(np.int16), np.diag([2, 2, 2, 1.0])
    image, turned = save(voxels, affine, "image.nii"), save(voxels[::-1], affine, "turned.nii")
    labels = {}
    for name, options in (("plain", {}), ("mirrored", {"mirror": ("x", "y", "z")})):
        for path in (image, turned):
            segment_file(path, tmp_path / "out.nii", bundle=bundle_folder, **options)
            labels[name, path] = read_volume(tmp_path / "out.nii").voxels
    assert (labels["mirrored", image] == labels["mirrored", turned][::-1]).mean() > 0.999
    assert (labels["plain", image] == labels["plain", turned][::-1]).mean() < 0.95
    for wrong in (("x", "x"), ("w",)):
        with pytest.raises(VolumeError, match="mirror takes each of x, y and z at most once"):
            segment_file(image, tmp_path / "out.nii", bundle=bundle_folder, mirror=wrong)


def test_cleaning_up_is_done_in_millilitres_and_reported(scans, bundle_folder, tmp_path):
    labels = {}
    for name, options in (("raw", {}), ("largest", {"keep_largest": True}), ("small", {"min_size_ml": 0.02})):
        result = segment_file(scans / "b.nii.gz", tmp_path / "out.nii.gz", bundle=bundle_folder, **options)
        labels[name] = read_volume(tmp_path / "out.nii.gz").voxels.astype(np.uint8)
        if options:
            expected = labels["raw"].copy()
            removed = clean_labels(expected, 0.0075, **options)
            assert removed > 0
            np.testing.assert_array_equal(labels[name], expected)
            assert f"cleaning up set {removed} voxels ({removed * 0.0075:.1f} ml) to background" in result.notes
        assert [s.voxels for s in result.segments] == [(labels[name] == label).sum() for label in (1, 2)]
    with pytest.raises(VolumeError, match="smallest size must be a volume in ml"):
        segment_file(scans / "b.nii.gz", tmp_path / "out.nii.gz", bundle=bundle_folder, min_size_ml=float("nan"))


def test_unknown_settings_are_an_error(scans, bundle_folder, tmp_path):
    with pytest.raises(TypeError, match="overlaps"):
        segment_file(scans / "b.nii.gz", tmp_path / "out.nii.gz", bundle=bundle_folder, overlaps=0.5)


@pytest.fixture
def channels(scans, rng):
    """The scans become two channels of each case."""
    for path in list(scans.iterdir()):
        stored = nibabel.load(path)
        for channel in range(2):
            name = path.name.replace(".nii", f"_000{channel}.nii")
            voxels = rng.integers(0, 1000, stored.shape).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels, stored.affine), scans / name)
        path.unlink()
    return scans


def test_a_network_of_two_channels_gets_both_in_their_order(channels, tmp_path):
    bundle = write_bundle(tmp_path / "two", channels=2)
    results = segment(channels, tmp_path / "out", bundle=bundle)
    assert [(result.name, result.problem) for result in results] == [("a", None), ("b", None), ("c", None)]
    images = [channels / "b_0000.nii.gz", channels / "b_0001.nii.gz"]
    segment_file(images, tmp_path / "out.nii.gz", bundle=bundle)
    assert (tmp_path / "out.nii.gz").read_bytes() == (tmp_path / "out" / "b.nii.gz").read_bytes()
    segment_file(images[::-1], tmp_path / "swapped.nii.gz", bundle=bundle)
    assert (read_volume(tmp_path / "swapped.nii.gz").voxels != read_volume(tmp_path / "out.nii.gz").voxels).any()


def test_wrong_channels_are_refused_in_a_sentence(channels, bundle_folder, tmp_path):
    two, out = write_bundle(tmp_path / "two", channels=2), tmp_path / "out.nii.gz"
    first, second, other = (channels / f"{name}.nii.gz" for name in ("a_0000", "a_0001", "b_0001"))
    for images, bundle, words in (
        (first, two, r"bundle two takes 2 image\(s\) of a subject, got 1; give exactly 2"),
        ([first, second], bundle_folder, r"takes 1 image\(s\) of a subject, got 2"),
        ([first, other], two, "voxels and .* resample the images of a subject to one grid"),
    ):
        with pytest.raises(VolumeError, match=words):
            segment_file(images, out, bundle=bundle)
    moved = nibabel.load(second)
    affine = moved.affine.copy()
    affine[0, 3] += 1
    nibabel.save(nibabel.Nifti1Image(np.asarray(moved.dataobj), affine), second)
    with pytest.raises(VolumeError, match="lie 1 mm apart in space; resample the images"):
        segment_file([first, second], out, bundle=two)
    with pytest.raises(VolumeError, match="case a must have 1 channel"):
        segment(channels, tmp_path / "out", bundle=bundle_folder)
    assert not out.exists()


def test_an_ensemble_of_different_labels_is_refused(scans, folds, tmp_path):
    metadata = folds[1] / "configs" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("white matter", "lesion"))
    with pytest.raises(VolumeError, match="fold1 and fold2 have different labels"):
        segment_file(scans / "a.nii.gz", tmp_path / "out.nii.gz", bundle=folds)


def test_logits_that_do_not_fit_into_memory_go_to_disk_and_give_the_same_result(scans, folds, tmp_path, monkeypatch):
    arguments = {"bundle": folds, "save_probabilities": True}
    segment_file(scans / "b.nii.gz", tmp_path / "memory.nii.gz", **arguments)
    made = []
    new_array = predicting.new_array
    monkeypatch.setattr(predicting, "new_array", lambda *call: made.append(new_array(*call)) or made[-1])
    monkeypatch.setattr(predicting, "_SLAB_VALUES", 3000)
    # 12 x 11 x 10 voxels become 16 ** 3 in the network; everything but the logits of two folds fits, the half-precision
    # probabilities of three labels included
    enough = 22 * 1320 + 60 * 4096 + 6 * 1320
    monkeypatch.setattr(memory, "available_memory", lambda: enough)
    segment_file(scans / "b.nii.gz", tmp_path / "disk.nii.gz", **arguments)
    assert [type(array) for array in made] == [np.memmap, np.memmap]
    for ending in (".nii.gz", ".npz"):
        assert (tmp_path / f"memory{ending}").read_bytes() == (tmp_path / f"disk{ending}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
        "".join(parts) for parts in itertools.product(("memory", "disk"), (".nii.gz", ".npz"))
    )
    monkeypatch.setattr(memory, "available_memory", lambda: enough - 1)
    with pytest.raises(VolumeError, match="of memory"):
        segment_file(scans / "b.nii.gz", tmp_path / "disk.nii.gz", **arguments)
