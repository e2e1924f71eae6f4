"""Small volumes and a small bundle for the tests of vssm.volumes."""

import nibabel
import numpy as np
import pytest
from volumes.samples import write_bundle

from vssm.volumes import VolumeError, read_volume

OBLIQUE = np.array(
    [[-1.9, 0.3, 0.2, 20.0], [0.25, 1.4, -0.5, -30.0], [0.15, 0.4, 2.8, 5.0], [0, 0, 0, 1]], dtype=np.float64
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def save(tmp_path):
    """save(voxels, affine, name="image.nii.gz") -> path; the codes are those nibabel sets (sform 2, qform 0)."""

    def write(voxels, affine=OBLIQUE, name="image.nii.gz"):
        path = tmp_path / name
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
        return path

    return write


@pytest.fixture
def image(save, rng):
    """A file of 9 x 8 x 7 voxels of int16 on oblique axes."""
    return save(rng.integers(0, 1000, (9, 8, 7)).astype(np.int16))


@pytest.fixture
def refusal():
    """refusal(path, call=read_volume) -> the VolumeError's message, checked to be one sentence with the file name."""

    def message(path, call=read_volume):
        with pytest.raises(VolumeError) as caught:
            call(path)
        text = str(caught.value)
        assert str(path) in text
        assert "\n" not in text
        assert len(text) < 400 + len(str(path))
        return text

    return message


@pytest.fixture
def bundle_folder(tmp_path):
    """A bundle on disk, see samples.py."""
    return write_bundle(tmp_path / "tiny_bundle")
