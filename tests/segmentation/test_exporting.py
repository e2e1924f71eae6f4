"""Exported bundles: MONAI runs and checks them, vssm segments with them, and both agree with the trainer."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import run as monai_run
from monai.bundle import verify_net_in_out
from PIL import Image
from segmentation.samples import write_nnunet, write_pictures

from vssm.cli import main
from vssm.segmentation import train
from vssm.segmentation.exporting import export_bundle
from vssm.segmentation.fitting import Run
from vssm.segmentation.network import build_network
from vssm.segmentation.planning import Plan
from vssm.segmentation.preparing import PreparedCase
from vssm.segmentation.validating import predict_case
from vssm.training.checkpoints import load_checkpoint
from vssm.volumes import VolumeError, load_bundle, predict_volume, read_volume

ROOT = Path(__file__).resolve().parents[2]
UMAMBA = {
    "features": [4, 6],
    "strides": [1, 2],
    "kernel_sizes": [3, 3],
    "num_blocks": [1, 1],
    "num_decoder_blocks": [1],
}


def run_bundle(bundle, images, output):
    """Run a bundle as `python -m monai.bundle run` does, in this process."""
    configs = bundle / "configs"
    monai_run(
        config_file=str(configs / "inference.json"),
        meta_file=str(configs / "metadata.json"),
        bundle_root=str(bundle),
        dataset_dir=str(images),
        output_dir=str(output),
        device="$torch.device('cpu')",
    )
    return sorted(path for path in output.rglob("*") if path.is_file())


def one_case(raw, folder):
    """A folder with all channels of one case of an nnU-Net folder."""
    folder.mkdir()
    for path in (raw / "imagesTr").glob("case1_*"):
        shutil.copy(path, folder)
    return folder


def predicted_by_trainer(run, name):
    """Labels of a prepared case by the best network of a run, on the network's grid."""
    best = load_checkpoint(run / "best.pt")
    network = build_network(best["definition"])
    network.load_state_dict(best["network"])
    (prepared,) = [folder for folder in (run / "cache").iterdir() if folder.name.startswith(f"{name}-")]
    case, plan = PreparedCase(name, prepared), Plan(**best["plan"])
    return predict_case(network, case, plan, best["options"]["overlap"], torch.device("cpu")).numpy()


@pytest.fixture(scope="module")
def run(plain_options, tmp_path_factory):
    """A run of a network with deep supervision, in its training form a list of outputs."""
    options = replace(
        plain_options,
        network="vssm.networks.UMambaBot",
        network_arguments={
            "features": [4, 4, 6],
            "strides": [1, 2, 2],
            "kernel_sizes": [3, 3, 3],
            "num_blocks": [1, 1, 1],
            "num_decoder_blocks": [1, 1],
        },
        optimizer="adamw",
        spacing=[2.0, 2.0, 2.5],
    )
    folder = tmp_path_factory.mktemp("export") / "run"
    train(options, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "exported"
    assert main(["export-bundle", str(run), "-o", str(folder)]) == 0
    return folder


def test_vssm_segments_with_it_as_the_trainer_does(run, bundle, data):
    loaded = load_bundle(bundle)
    assert loaded.labels == ("background", "ball", "box")
    labels = predict_volume(read_volume(data / "imagesTr" / "case0_0000.nii.gz"), loaded, device="cpu")
    assert len(np.unique(labels)) > 1
    assert (labels == predicted_by_trainer(run, "case0")).mean() > 0.999


def test_monai_runs_it_and_writes_the_same_labels(bundle, data, tmp_path):
    path = data / "imagesTr" / "case1_0000.nii.gz"
    images = one_case(data, tmp_path / "images")
    command = [
        *(sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"),
        *("--meta_file", "configs/metadata.json", "--bundle_root", ".", "--dataset_dir", str(images)),
        *("--output_dir", str(tmp_path / "out")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("*.nii.gz")
    image = nibabel.load(written)
    labels = np.asarray(image.dataobj)
    np.testing.assert_allclose(image.affine, nibabel.load(path).affine)
    expected = predict_volume(read_volume(path), load_bundle(bundle), device="cpu")
    assert (labels == expected).mean() > 0.999


def test_monais_own_check_accepts_it(bundle):
    configs = bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
    )
    metadata = json.loads((configs / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "ball",
        "2": "box",
    }


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["export-bundle", str(tmp_path), "-o", str(tmp_path / "bundle")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    (tmp_path / "best.pt").write_bytes(b"nothing")
    with pytest.raises(VolumeError, match="is damaged"):
        export_bundle(tmp_path, tmp_path / "bundle")


def test_slices_of_volumes_train_a_2d_network_that_monai_can_apply(plain_options, data, tmp_path):
    options = replace(
        plain_options,
        flat=True,
        spacing=[2.0, 2.0, 2.5],
        patch_size=[16, 16, 1],
        network="vssm.networks.UMambaBot",
        network_arguments=UMAMBA,
        optimizer="adamw",
    )
    train(options, tmp_path / "run")
    export_bundle(tmp_path / "run", tmp_path / "bundle")
    inference = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())
    assert inference["network_def"]["spatial_dims"] == 2
    (written,) = run_bundle(tmp_path / "bundle", one_case(data, tmp_path / "images"), tmp_path / "out")
    labels = np.asarray(nibabel.load(written).dataobj)
    assert len(np.unique(labels)) > 1
    assert (labels == predicted_by_trainer(tmp_path / "run", "case1")).mean() > 0.999


def test_colour_pictures_train_with_paired_masks_and_export(plain_options, tmp_path):
    write_pictures(tmp_path / "isic")
    options = replace(
        plain_options,
        data=str(tmp_path / "isic"),
        channels=["R", "G", "B"],
        labels={0: "skin", 1: "lesion"},
        label_suffix="_segmentation",
        resize=[32, 32, 1],
        patch_size=[32, 32, 1],
        augmentation="pictures",
        steps_per_epoch=30,
        optimizer="adamw",
        learning_rate=0.02,
        average_decay=0.9,
    )
    outcome = train(options, tmp_path / "run")
    assert outcome.best_dice > 0.6
    export_bundle(tmp_path / "run", tmp_path / "bundle")
    written = run_bundle(tmp_path / "bundle", tmp_path / "isic" / "images", tmp_path / "out")
    assert len(written) == 4
    for path in written:
        found = np.asarray(Image.open(path))
        name = path.name.removesuffix("_seg.png")
        truth = np.asarray(Image.open(tmp_path / "isic" / "masks" / f"{name}_segmentation.png")) > 0
        assert found.shape == truth.shape
        assert set(np.unique(found)) == {0, 1}
        assert 2 * ((found > 0) & truth).sum() / ((found > 0).sum() + truth.sum()) > 0.6


def test_several_channels_train_and_export(plain_options, tmp_path):
    options = replace(plain_options, data=str(write_nnunet(tmp_path / "raw", channels=2)))
    run = Run(options, tmp_path / "run", False, list)
    run(lambda moment: None)
    export_bundle(tmp_path / "run", tmp_path / "bundle", "last")
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 2
    assert load_bundle(tmp_path / "bundle").labels == ("background", "ball", "box")
    (written,) = run_bundle(tmp_path / "bundle", one_case(tmp_path / "raw", tmp_path / "images"), tmp_path / "out")
    assert nibabel.load(written).shape == nibabel.load(tmp_path / "raw" / "labelsTr" / "case1.nii.gz").shape
