"""Hundreds of damaged files through `segment_folder`: each is refused in a sentence or segmented as what it says.

A flipped bit in an uncompressed file gives another, valid file more often than not: no reader can tell a grey value or
an origin from another. What is demanded there is the segmentation of the file as it now is, for which nibabel's reading
of it is the measure. A compressed file has a checksum: it gives the labels of the undamaged file or none.
"""

import gzip
import struct
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from vssm.volumes import load_bundle, memory, predict_volume, read_volume, segment_folder

# (offset, format) of header fields that decide how many voxels of what there are and where they lie
FIELDS = {
    "sizeof_hdr": (0, "i"), "rank": (40, "h"), "dim1": (42, "h"), "dim3": (46, "h"), "dim4": (48, "h"),
    "datatype": (70, "h"), "bitpix": (72, "h"), "qfac": (76, "f"), "pixdim1": (80, "f"), "pixdim3": (88, "f"),
    "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "b"),
    "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern_b": (256, "f"), "qoffset_x": (268, "f"),
    "srow_x0": (280, "f"), "srow_y3": (308, "f"), "magic": (344, "i"),
}  # fmt: skip
ABSURD = {
    "i": (0, -1, 2**31 - 1), "h": (0, -1, 2, 4, 32767), "b": (1, 3, 127),
    "f": (0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-38, 352.5),
}  # fmt: skip
HEADER = 352


def flip(content, rng, start, stop):
    damaged = bytearray(content)
    damaged[rng.integers(start, stop)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def damages(plain, rng):
    """(name, content) of damaged copies of a .nii file, plain and packed."""
    packed = gzip.compress(plain, mtime=0)
    for kind, (offset, form) in FIELDS.items():
        for value in ABSURD[form]:
            damaged = bytearray(plain)
            struct.pack_into("<" + form, damaged, offset, value)
            yield f"absurd_{kind}_{value}.nii", bytes(damaged)
            if value == ABSURD[form][-1]:
                yield f"absurd_{kind}_{value}_packed.nii.gz", gzip.compress(bytes(damaged))
    for turn in range(80):
        yield f"header_{turn}.nii", flip(plain, rng, 0, HEADER)
        yield f"packed_{turn}.nii.gz", flip(packed, rng, 0, len(packed))
    for turn in range(20):
        yield f"start_{turn}.nii.gz", flip(packed, rng, 0, 30)
        yield f"end_{turn}.nii.gz", flip(packed, rng, len(packed) - 8, len(packed))
        yield f"voxels_{turn}.nii", flip(plain, rng, HEADER, len(plain))
        yield f"cut_{turn}.nii", plain[: rng.integers(len(plain))]
        yield f"cut_packed_{turn}.nii.gz", packed[: rng.integers(len(packed))]
    for turn, more in enumerate((b"\0", b"x", plain[-100:], plain, packed)):
        yield f"longer_{turn}.nii", plain + more
        yield f"longer_packed_{turn}.nii.gz", packed + more
    yield "swapped.nii", packed
    yield "swapped_packed.nii.gz", plain


@pytest.fixture
def plain(image, tmp_path):
    """Bytes of a file with both transforms and a scaling."""
    source = nibabel.load(image)
    twice = nibabel.Nifti1Image(source.get_fdata().astype(np.int16), source.affine)
    twice.set_qform(source.affine, code=1)
    twice.header.set_slope_inter(0.5, -3)
    nibabel.save(twice, tmp_path / "plain.nii")
    return (tmp_path / "plain.nii").read_bytes()


@pytest.mark.filterwarnings("error")
def test_no_damaged_file_gives_a_wrong_result_an_exception_or_a_partial_file(
    plain, rng, bundle_folder, tmp_path, monkeypatch
):
    # a small machine: headers that ask for a large grid are refused and not predicted for hours
    monkeypatch.setattr(memory, "available_memory", lambda: 600_000_000)
    source, results = tmp_path / "source", tmp_path / "results"
    source.mkdir()
    contents = dict(damages(plain, rng))
    for name, content in contents.items():
        (source / name).write_bytes(content)
    (source / "undamaged.nii").write_bytes(plain)
    bundle = load_bundle(bundle_folder)
    good = read_volume(source / "undamaged.nii")
    undamaged = predict_volume(good, bundle)
    assert len(np.unique(undamaged)) > 1
    known = {}

    def expected(path):
        """Affine and labels of what nibabel reads from the file."""
        stored = nibabel.load(path)
        voxels = stored.get_fdata(dtype=np.float64).reshape(stored.shape[:3]).astype(np.float32)
        key = voxels.tobytes(), stored.affine.tobytes(), voxels.shape
        if key not in known:
            known[key] = predict_volume(replace(good, voxels=voxels, affine=stored.affine), bundle)
        return stored.affine, known[key]

    refused, kept = set(), set()
    for case in segment_folder(source, results, bundle=bundle_folder):
        (path,) = (path for path in (source / f"{case.name}.nii", source / f"{case.name}.nii.gz") if path.exists())
        if case.problem is not None:
            assert str(path) in case.problem
            assert "\n" not in case.problem
            assert not case.output.exists()
            refused.add(path.name)
            continue
        written = nibabel.load(case.output)
        labels = np.asarray(written.dataobj).reshape(written.shape[:3])
        if path.name.endswith(".gz") and not path.name.startswith("absurd"):
            affine, wanted = good.affine, undamaged
        else:
            affine, wanted = expected(path)
        np.testing.assert_array_equal(written.affine, affine, err_msg=path.name)
        np.testing.assert_array_equal(labels, wanted, err_msg=path.name)
        kept.add(path.name)
    assert len(contents) >= 200
    assert refused | kept == {*contents, "undamaged.nii"}
    assert {path.name for path in results.iterdir()} == {f"{name.split('.nii')[0]}.nii.gz" for name in kept}
    # both outcomes are common, and what can be seen is seen
    assert len(kept) > 60
    assert len(refused) > 150
    assert {name for name in contents if name.startswith(("cut", "end", "longer", "swapped"))} - refused <= {
        "longer_packed_0.nii.gz"
    }
