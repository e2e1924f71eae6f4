"""The small data set of real anatomy, and README's way through the tools with it, at a small size."""

import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from vssm.cli import main as vssm
from vssm.segmentation.datasets import read_dataset
from vssm.volumes.phantom import load_phantom

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import brain_dataset
import train_segmenter

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "medical" / "brain.yaml"
RESOLUTION = 6


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """A folder of two scans to learn from and one to be measured on."""
    folder = tmp_path_factory.mktemp("data") / "brain"
    assert brain_dataset.main([str(folder), "--cases", "2", "--resolution", str(RESOLUTION)]) == 0
    return folder


def test_halves_lie_where_they_are_in_the_template_and_never_overlap(brain):
    whole = load_phantom(RESOLUTION)
    for part, name, side in (("Tr", "left1", -1), ("Ts", "right", 1)):
        image = nibabel.load(brain / f"images{part}" / f"{name}_0000.nii.gz")
        labels = nibabel.load(brain / f"labels{part}" / f"{name}.nii.gz")
        assert np.array_equal(image.affine, labels.affine) and image.shape == labels.shape
        x = [nibabel.affines.apply_affine(labels.affine, [i, 0, 0])[0] for i in (0, labels.shape[0] - 1)]
        assert min(side * x[0], side * x[1]) > 0
        corner = np.linalg.inv(whole.image.affine) @ labels.affine[:, 3]
        box = tuple(slice(int(a), int(a) + n) for a, n in zip(corner.round(), labels.shape, strict=False))
        assert np.array_equal(np.asarray(labels.dataobj), whole.labels[box].numpy())
        assert set(np.unique(labels.dataobj)) == {0, 1, 2}


def test_scans_of_the_same_anatomy_differ(brain):
    one, other = (nibabel.load(brain / "imagesTr" / f"left{i}_0000.nii.gz").get_fdata() for i in (0, 1))
    assert not np.array_equal(one, other)


def test_it_is_a_data_set_and_is_not_overwritten(brain, capsys):
    assert len(read_dataset(brain).cases) == 2
    assert brain_dataset.main([str(brain)]) == 2
    assert "there is a data set already" in capsys.readouterr().err


def test_train_segment_evaluate_view(brain, tmp_path):
    run, predictions = tmp_path / "run", tmp_path / "predictions"
    changes = {
        "data": brain,
        "network_arguments": "{features: [4, 8], strides: [1, 2], kernel_sizes: [3, 3], num_blocks: [1, 1], "
        "num_decoder_blocks: [1]}",
        "folds": 2,
        "patch_size": "[12, 16, 16]",
        "epochs": 1,
        "steps_per_epoch": 3,
    }
    settings = [f"--set={key}={value}" for key, value in changes.items()]
    assert train_segmenter.main(["--config", str(CONFIG), "--output", str(run), *settings]) == 0
    segment = ["segment", str(brain / "imagesTs"), "-o", str(predictions), "--bundle", str(run / "bundle")]
    assert vssm([*segment, "--device", "cpu", "--quiet"]) == 0
    assert vssm(["evaluate", str(predictions), str(brain / "labelsTs"), "-o", str(tmp_path / "report")]) == 0
    page = tmp_path / "page.html"
    image, label = brain / "imagesTs" / "right_0000.nii.gz", predictions / "right.nii.gz"
    assert vssm(["view", str(image), "--prediction", str(label), "-o", str(page)]) == 0
    assert (tmp_path / "report" / "summary.json").is_file() and page.stat().st_size > 10_000
