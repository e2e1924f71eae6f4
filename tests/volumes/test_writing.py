"""Results lie exactly on the input's grid and appear whole or not at all."""

import errno
import os
import time

import nibabel
import numpy as np
import pytest

from vssm.volumes import VolumeError, read_volume, write_labels
from vssm.volumes.writing import atomic_file, check_output

GEOMETRY = (
    "dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def labels_for(volume):
    return (np.arange(volume.voxels.size) % 5).astype(np.uint8).reshape(volume.voxels.shape)


def geometries():
    """Headers as scanners and programs leave them: both transforms, one, none, trailing axes, other units, NIfTI-2."""
    rotation = np.array([[0, -1.7, 0.1, 1], [1.9, 0, 0.2, 2], [0.1, -0.2, 4, 3], [0, 0, 0, 1.0]])
    for image_class in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for sform, qform in ((2, 1), (4, 0), (0, 1), (0, 0), (1, 1)):
            image = image_class(np.ones((4, 5, 6, 1), np.int16), rotation)
            image.set_qform(rotation if qform != sform else np.diag([2, 2, 4, 1.0]), code=qform)
            image.set_sform(rotation, code=sform)
            image.header.set_xyzt_units("mm", "sec")
            yield image


def image_name(image):
    codes = (int(image.header[field]) for field in ("sform_code", "qform_code"))
    return "{}-sform{}-qform{}".format(type(image).__name__, *codes)


@pytest.mark.parametrize("source", list(geometries()), ids=image_name)
@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_label_maps_keep_every_geometry_field_of_the_input(tmp_path, source, name):
    nibabel.save(source, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    write_labels(labels_for(volume), volume, tmp_path / name)
    before, after = nibabel.load(tmp_path / "in.nii"), nibabel.load(tmp_path / name)
    assert type(after.header) is type(before.header)
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(after.affine, before.affine)
    for field in GEOMETRY:
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)
    np.testing.assert_array_equal(np.asarray(after.dataobj)[..., 0], labels_for(volume))
    np.testing.assert_array_equal(read_volume(tmp_path / name).voxels, labels_for(volume))


def test_nothing_about_the_patient_is_copied_from_the_header(tmp_path):
    image = nibabel.Nifti1Image(np.ones((3, 4, 5)), np.eye(4))
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = b"Doe^Jane"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    nibabel.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    write_labels(labels_for(volume), volume, tmp_path / "out.nii")
    assert b"Doe" in (tmp_path / "in.nii").read_bytes()
    assert b"Doe" not in (tmp_path / "out.nii").read_bytes()


def test_equal_labels_give_equal_bytes_under_any_name_at_any_time(image, tmp_path, monkeypatch):
    clock = iter(range(10**9, 2 * 10**9, 10**6))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    volume = read_volume(image)
    for name in ("one.nii.gz", "two.nii.gz"):
        write_labels(labels_for(volume), volume, tmp_path / name)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_an_existing_result_is_replaced(image, tmp_path):
    volume = read_volume(image)
    (tmp_path / "out.nii").write_text("old")
    write_labels(labels_for(volume), volume, tmp_path / "out.nii")
    assert read_volume(tmp_path / "out.nii").voxels.max() == 4


def test_a_link_stays_a_link_to_the_new_result(image, tmp_path):
    volume = read_volume(image)
    (tmp_path / "real").mkdir()
    (tmp_path / "out.nii").symlink_to(tmp_path / "real" / "result.nii")
    write_labels(labels_for(volume), volume, tmp_path / "out.nii")
    assert (tmp_path / "out.nii").is_symlink()
    assert read_volume(tmp_path / "real" / "result.nii").voxels.max() == 4


@pytest.mark.parametrize(
    "labels", [np.zeros((9, 8, 6), np.uint8), np.zeros((9, 8, 7), np.int64)], ids=["shape", "dtype"]
)
def test_labels_of_another_grid_or_type_are_refused(image, tmp_path, labels):
    with pytest.raises(ValueError, match=r"uint8 of shape \(9, 8, 7\)"):
        write_labels(labels, read_volume(image), tmp_path / "out.nii")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), MemoryError()])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_leaves_things_as_they_were(tmp_path, failure, existing):
    path = tmp_path / "out.nii"
    if existing:
        path.write_text("old")
    expected = VolumeError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), atomic_file(path) as stream:
        stream.write(b"half")
        raise failure
    assert os.listdir(tmp_path) == (["out.nii"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_a_full_disk_is_named_with_the_file_and_a_remedy(image, tmp_path, monkeypatch, refusal):
    volume = read_volume(image)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = refusal(tmp_path / "out.nii.gz", lambda path: write_labels(labels_for(volume), volume, path))
    assert "No space left on device" in text
    assert "free some space" in text
    assert sorted(os.listdir(tmp_path)) == [image.name]


def test_the_result_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda _: seen.append("synced"))
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append("named"), replace(*paths)))
    with atomic_file(tmp_path / "out.nii") as stream:
        stream.write(b"x")
        assert not (tmp_path / "out.nii").exists()
        assert len(os.listdir(tmp_path)) == 1
    assert seen == ["synced", "named"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_results_get_ordinary_rights(tmp_path):
    with atomic_file(tmp_path / "out.nii"):
        pass
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "out.nii").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    "name, words",
    [
        ("out.mha", "must be named .nii or .nii.gz"),
        ("out.gz", "must be named .nii or .nii.gz"),
        ("none/out.nii", "does not exist"),
        ("folder.nii", "not an ordinary file"),
        ("image.nii.gz", "is the input itself"),
        ("link.nii.gz", "is the input itself"),
    ],
)
def test_a_place_that_cannot_take_the_result_is_refused_before_work(image, tmp_path, refusal, name, words):
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(image)
    before = image.read_bytes()
    assert words in refusal(tmp_path / name, lambda path: check_output(path, (".nii", ".nii.gz"), (image,)))
    volume = read_volume(image)
    with pytest.raises(VolumeError):
        write_labels(labels_for(volume), volume, tmp_path / name)
    assert image.read_bytes() == before


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch, refusal):
    # the superuser may write anywhere, so the answer of the system is set here
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written to" in refusal(tmp_path / "out.nii", lambda path: check_output(path, (".nii",)))
