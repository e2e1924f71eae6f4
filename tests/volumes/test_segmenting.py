"""From file to file: the result is counted, pictured and written, or nothing is touched."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from vssm.volumes import VolumeError, read_volume, segment_file
from vssm.volumes.overlay import draw_overlay


def test_the_label_map_lies_on_the_input_and_its_counts_are_reported(image, bundle_folder, tmp_path):
    result = segment_file(image, tmp_path / "out.nii.gz", bundle=bundle_folder)
    source, written = nibabel.load(image), nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.affine, source.affine)
    assert written.shape == source.shape
    labels = np.asarray(written.dataobj)
    assert [(s.label, s.name) for s in result.segments] == [(1, "grey matter"), (2, "white matter")]
    voxel = abs(np.linalg.det(source.affine[:3, :3])) / 1000
    for segment in result.segments:
        assert segment.voxels == (labels == segment.label).sum()
        assert segment.millilitres == pytest.approx(segment.voxels * voxel)
    assert sum(s.voxels for s in result.segments) > 0


def test_two_runs_write_the_same_bytes(image, bundle_folder, tmp_path):
    for name in ("one.nii.gz", "two.nii.gz"):
        segment_file(image, tmp_path / name, bundle=bundle_folder)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_what_is_unusual_about_the_volume_is_reported(image, bundle_folder, tmp_path):
    (extent, bright) = segment_file(image, tmp_path / "out.nii.gz", bundle=bundle_folder).notes
    assert "learned from 180 x 220 x 180 mm" in extent
    assert "learned from 1500 ml" in bright


def test_a_picture_is_drawn_when_asked_for(image, bundle_folder, tmp_path):
    segment_file(image, tmp_path / "out.nii.gz", bundle=bundle_folder, overlay=tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        picture.load()
        assert picture.size[0] > picture.size[1] > 300


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)], ids=str)
def test_the_picture_is_the_same_however_the_voxels_are_stored(tmp_path, rng, axes, signs):
    grey, labels = rng.random((20, 24, 9)), np.zeros((20, 24, 9), np.uint8)
    labels[3:9, 4:20, 2:7] = 1
    plain = np.diag([1, 2, 3, 1.0])
    names = ("background", "inside")
    draw_overlay(grey, labels, plain, names, tmp_path / "plain.png")
    flips = tuple(slice(None, None, sign) for sign in signs)
    stored = plain @ np.diag([*signs, 1])
    stored[:, :3] = stored[:, list(axes)]
    draw_overlay(*(array[flips].transpose(axes) for array in (grey, labels)), stored, names, tmp_path / "stored.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "stored.png").read_bytes()


@pytest.mark.parametrize("shape", [(1, 8, 9), (8, 1, 9), (8, 9, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("label", [0, 1])
def test_flat_and_empty_results_are_pictured_too(tmp_path, shape, label):
    draw_overlay(np.ones(shape), np.full(shape, label, np.uint8), np.eye(4), ("none", "all"), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()


def test_a_refused_run_touches_no_result_of_an_earlier_one(image, bundle_folder, tmp_path):
    output, overlay = tmp_path / "out.nii.gz", tmp_path / "out.png"
    output.write_text("old")
    overlay.write_text("old")
    refused = [
        {"image": tmp_path / "none.nii.gz"},
        {"overlay": tmp_path / "out.jpg"},
        {"overlay": tmp_path / "none" / "out.png"},
        {"bundle": "lungs"},
        {"device": "cuda:99"},
        {"overlap": 2.0},
    ]
    for changes in refused:
        arguments = {"image": image, "output": output, "bundle": bundle_folder, "overlay": overlay} | changes
        with pytest.raises(VolumeError):
            segment_file(arguments.pop("image"), arguments.pop("output"), **arguments)
        assert output.read_text() == overlay.read_text() == "old"
    with pytest.raises(VolumeError, match="is the input itself"):
        segment_file(image, image, bundle=bundle_folder)
    read_volume(image)


def test_a_place_for_the_result_is_checked_before_the_volume_is_read(tmp_path):
    (tmp_path / "damaged.nii").write_text("no volume")
    with pytest.raises(VolumeError, match="does not exist; create it first"):
        segment_file(tmp_path / "damaged.nii", tmp_path / "none" / "out.nii")
