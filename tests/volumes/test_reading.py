"""A NIfTI file is read exactly or refused with one sentence; never is damaged data taken for a volume."""

import gzip
import os
import struct

import nibabel
import numpy as np
import pytest

from vssm.volumes import VolumeError, memory, read_volume

# byte offsets of NIfTI-1 fields
DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SCL_SLOPE, XYZT, QFORM_CODE, SFORM_CODE, QUATERN_B, SROW_X, MAGIC = (
    40, 70, 72, 76, 108, 112, 123, 252, 254, 256, 280, 344,
)  # fmt: skip


@pytest.fixture
def patched(save, rng):
    """patched(offset, format, *values) -> an otherwise good .nii.gz with these bytes of its header replaced."""
    plain = save(rng.integers(0, 1000, (9, 8, 7)).astype(np.int16), name="plain.nii")

    def write(*changes, name="patched.nii.gz"):
        content = bytearray(plain.read_bytes())
        for offset, form, *values in changes:
            struct.pack_into(form, content, offset, *values)
        path = plain.with_name(name)
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        return path

    return write


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_voxels_and_affine_equal_nibabels(save, rng, name, dtype):
    path = save((rng.random((5, 6, 4)) * 200).astype(dtype), name=name)
    volume, expected = read_volume(path), nibabel.load(path)
    np.testing.assert_array_equal(volume.voxels, expected.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.voxels.dtype == np.float32
    assert volume.notes == ()


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_nifti_versions_and_byte_orders_are_read(tmp_path, rng, image_class, order):
    path = tmp_path / "a.nii.gz"
    header = image_class.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
    voxels = rng.integers(-500, 500, (4, 5, 6)).astype(np.int16)
    nibabel.save(image_class(voxels, np.diag([2, 3, 4, 1.0]), header), path)
    np.testing.assert_array_equal(read_volume(path).voxels, voxels)
    np.testing.assert_allclose(read_volume(path).spacing, [2, 3, 4])


def test_slope_and_intercept_are_applied(patched):
    volume = read_volume(patched((SCL_SLOPE, "<ff", 0.5, -3.0)))
    stored = read_volume(patched())
    np.testing.assert_allclose(volume.voxels, stored.voxels * 0.5 - 3, rtol=1e-6)


def test_slope_zero_means_unscaled_as_nifti_says(patched):
    scaled, plain = read_volume(patched((SCL_SLOPE, "<ff", 0.0, 7.0))), read_volume(patched(name="b.nii"))
    np.testing.assert_array_equal(scaled.voxels, plain.voxels)


def test_what_nifti_leaves_open_is_completed_without_a_word(patched, caplog):
    """A third-axis sign of 0 stands for 1, and the size of a voxel in bits follows from its type."""
    caplog.set_level(0)
    volume = read_volume(patched((PIXDIM, "<f", 0.0), (BITPIX, "<h", 0)))
    np.testing.assert_array_equal(volume.affine, read_volume(patched()).affine)
    assert caplog.records == []


def test_trailing_axes_of_one_are_dropped(save, rng):
    voxels = rng.random((4, 5, 6, 1, 1)).astype(np.float32)
    assert read_volume(save(voxels)).voxels.shape == (4, 5, 6)


def test_header_extensions_are_skipped(tmp_path, rng):
    image = nibabel.Nifti1Image(rng.random((4, 5, 6)).astype(np.float32), np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"private " * 40))
    nibabel.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").voxels, image.get_fdata(dtype=np.float32))


@pytest.mark.parametrize("kept", ["sform", "qform"])
def test_either_transform_alone_gives_the_affine(save, rng, kept):
    rotation = np.array([[0, -2, 0, 1], [3, 0, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(rng.random((4, 5, 6)), None)
    getattr(image, f"set_{kept}")(rotation, code=1)
    other = "qform" if kept == "sform" else "sform"
    getattr(image, f"set_{other}")(None, code=0)
    nibabel.save(image, path := save(np.zeros((2, 2, 2))))
    np.testing.assert_allclose(read_volume(path).affine, rotation, atol=1e-5)
    assert read_volume(path).notes == ()


def test_disagreeing_transforms_use_the_sform_and_say_so(save):
    image = nibabel.Nifti1Image(np.arange(60.0).reshape(3, 4, 5), np.diag([2, 2, 2, 1.0]))
    image.set_qform(np.diag([2, 2, 3, 1.0]), code=1)
    image.set_sform(np.diag([2, 2, 2, 1.0]), code=1)
    nibabel.save(image, path := save(np.zeros((2, 2, 2))))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.affine, np.diag([2, 2, 2, 1.0]))
    assert len(volume.notes) == 1
    assert "sform and qform differ by up to 4.0 mm" in volume.notes[0]


def test_a_volume_without_orientation_is_read_with_a_note(patched):
    volume = read_volume(patched((SFORM_CODE, "<h", 0), (QFORM_CODE, "<h", 0)))
    assert "left and right are a guess" in volume.notes[0]


def test_a_constant_volume_is_read_with_a_note(save):
    assert "nothing to segment" in read_volume(save(np.full((3, 4, 5), 7.0))).notes[0]


def test_missing_file_folder_and_wrong_ending_are_named(tmp_path, refusal):
    assert "no such file" in refusal(tmp_path / "none.nii.gz")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "scan.dcm").write_bytes(b"x")
    assert "not named .nii or .nii.gz" in refusal(tmp_path / "scan.dcm")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("content", [b"", b"hello\n", b"not a volume " * 100, b"\x1f\x8b"], ids=len)
def test_files_that_are_no_volumes_are_refused(tmp_path, refusal, name, content):
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
def test_every_truncation_is_refused(save, rng, refusal, name):
    path = save(rng.integers(0, 9, (5, 4, 3)).astype(np.int16), name=name)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refusal(path)
    path.write_bytes(content[:-1])
    refusal(path)


def test_unreadable_permissions_are_named(image, monkeypatch, refusal):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gzip, "open", deny)
    assert "may not be read by you" in refusal(image)


REFUSED_HEADERS = {
    "unknown datatype": ([(DATATYPE, "<h", 999)], "damaged header"),
    "complex numbers": ([(DATATYPE, "<h", 32)], "complex numbers"),
    "colours": ([(DATATYPE, "<h", 128)], "colours"),
    "negative size": ([(DIM + 4, "<h", -8)], "must be positive"),
    "size zero": ([(DIM + 2, "<h", 0)], "must be positive"),
    "two dimensions": ([(DIM, "<h", 2)], "one 3-D volume is needed"),
    "eight dimensions": ([(DIM, "<h", 8)], "8 dimensions"),
    "a series": ([(DIM, "<5h", 4, 9, 8, 1, 7)], "(9, 8, 1, 7); one 3-D volume is needed"),
    "a shorter axis": ([(DIM + 2, "<h", 8)], "more bytes follow"),
    "a longer axis": ([(DIM + 2, "<h", 10)], "the file is cut off"),
    "slope NaN": ([(SCL_SLOPE, "<f", np.nan)], "scl_slope nan"),
    "slope infinite": ([(SCL_SLOPE, "<f", np.inf)], "scl_slope inf"),
    "intercept NaN": ([(SCL_SLOPE, "<ff", 2.0, np.nan)], "scl_inter nan"),
    "unknown sform code": ([(SFORM_CODE, "<h", 37)], "sform_code 37"),
    "unknown qform code": ([(QFORM_CODE, "<h", -1)], "qform_code -1"),
    "sform NaN": ([(SROW_X, "<f", np.nan)], "not finite"),
    "sform singular": ([(SROW_X, "<12f", *range(12))], "cannot be inverted"),
    "sform zero": ([(SROW_X, "<12f", *[0] * 12)], "cannot be inverted"),
    "qform damaged": ([(SFORM_CODE, "<h", 0), (QFORM_CODE, "<h", 1), (QUATERN_B, "<fff", 3, 4, 5)], "damaged qform"),
    "spacing zero": ([(PIXDIM + 4, "<f", 0.0)], "voxel sizes (0,"),
    "spacing negative": ([(PIXDIM + 8, "<f", -1.0)], "must be positive and finite"),
    "spacing infinite": ([(PIXDIM + 12, "<f", np.inf)], "must be positive and finite"),
    "metres": ([(XYZT, "<B", 1)], "measures its voxels in metres"),
    "micrometres": ([(XYZT, "<B", 3)], "measures its voxels in micrometres"),
    "offset inside the header": ([(VOX_OFFSET, "<f", 8.0)], "damaged header"),
    "offset NaN": ([(VOX_OFFSET, "<f", np.nan)], "at byte nan"),
    "offset behind the end": ([(VOX_OFFSET, "<f", 5000.0)], "ends before its voxels begin"),
    "no magic": ([(MAGIC, "<4s", b"abcd")], "lacks the mark"),
    "a pair's header": ([(MAGIC, "<4s", b"ni1\0")], "lacks the mark"),
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("changes, words", REFUSED_HEADERS.values(), ids=REFUSED_HEADERS)
def test_a_wrong_header_is_refused_with_its_reason(patched, refusal, name, changes, words):
    text = refusal(patched(*changes, name=name))
    # an uncompressed file's length gives a size that does not fit away before anything is read
    assert words in text or (name == "a.nii" and "on disk cannot hold" in text)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_that_claims_an_enormous_volume_costs_no_memory(patched, refusal, monkeypatch, name):
    def forbidden(*_, **__):
        raise AssertionError("memory was allocated")

    path = patched((DIM, "<4h", 3, 32767, 32767, 32767), name=name)
    monkeypatch.setattr("vssm.volumes.reading.np.empty", forbidden)
    assert "on disk cannot hold" in refusal(path)


def test_a_volume_larger_than_the_memory_is_refused_before_it_is_read(image, monkeypatch, refusal):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert "of memory" in refusal(image)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted_and_refused(save, refusal, value):
    voxels = np.ones((4, 5, 6), np.float32)
    voxels[1, 2, 3] = voxels[0, 0, 0] = value
    assert "2 of 120 voxels" in refusal(save(voxels))


def test_voxels_beyond_single_precision_are_refused(save, refusal):
    assert "1 of 8 voxels" in refusal(save(np.array([1e300] + [1.0] * 7).reshape(2, 2, 2)))


def test_several_gzip_members_are_one_file(image):
    expected = read_volume(image).voxels
    content = gzip.decompress(image.read_bytes())
    image.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    np.testing.assert_array_equal(read_volume(image).voxels, expected)


def test_zero_padding_behind_the_gzip_member_is_allowed(image):
    expected = read_volume(image).voxels
    image.write_bytes(image.read_bytes() + bytes(512))
    np.testing.assert_array_equal(read_volume(image).voxels, expected)


def test_other_bytes_behind_the_gzip_member_are_refused(image, refusal):
    image.write_bytes(image.read_bytes() + b"garbage")
    refusal(image)


def test_a_second_volume_behind_the_first_is_refused(image, refusal):
    image.write_bytes(image.read_bytes() * 2)
    assert "more bytes follow" in refusal(image)


def test_a_stream_that_unpacks_to_far_more_than_its_header_says_is_not_unpacked(image, refusal, monkeypatch):
    asked = []
    plain = gzip.GzipFile.read

    def read(stream, size=-1):
        asked.append(size)
        return plain(stream, size)

    content = gzip.decompress(image.read_bytes())
    image.write_bytes(gzip.compress(content + bytes(50_000_000)))
    monkeypatch.setattr(gzip.GzipFile, "read", read)
    assert "more bytes follow" in refusal(image)
    assert 0 <= min(asked) and sum(asked) < 10_000


def test_any_flipped_bit_in_a_compressed_file_changes_nothing_or_is_refused(save, rng):
    """nibabel alone returned other voxels for 38 of 207 such flips."""
    smooth = np.add.outer(np.add.outer(np.arange(12), np.arange(11)), np.arange(10)).astype(np.int16)
    path = save(smooth + rng.integers(0, 2, smooth.shape, dtype=np.int16))
    content, good = path.read_bytes(), read_volume(path)
    outcome = {"same": 0, "refused": 0}
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except VolumeError:
            outcome["refused"] += 1
            continue
        np.testing.assert_array_equal(volume.voxels, good.voxels, err_msg=f"byte {position}")
        np.testing.assert_array_equal(volume.affine, good.affine, err_msg=f"byte {position}")
        outcome["same"] += 1
    # only time stamp, file name and the like may change without a word
    assert outcome["same"] < 40 < outcome["refused"]


def test_random_damage_never_escapes_as_another_error(save, rng):
    path = save(rng.integers(0, 50, (6, 6, 6)).astype(np.int16), name="a.nii")
    content = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(content)
        for position in rng.integers(0, 352, 4):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except VolumeError:
            continue
        assert np.isfinite(volume.affine).all()
        assert np.isfinite(volume.voxels).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path, refusal):
    os.mkfifo(tmp_path / "pipe.nii")
    assert "not an ordinary file" in refusal(tmp_path / "pipe.nii")
