"""Training for real: the packages' own tools on four real pictures; what it learns, writes and reads back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import packages
import pytest
import torch
from PIL import Image, ImageDraw
from small import DETECTOR, PICTURES, SEGMENTOR

from vssm.integrations.openmmlab import build_model

TOOLS = {package: Path(packages.folder(package)) / ".mim" / "tools" / "train.py" for package in ("mmdet", "mmseg")}


def train(package, text, folder):
    """Runs a package's own tools/train.py and returns its scalars, one dictionary for each line of its log."""
    config = folder / "config.py"
    config.write_text(text)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS[package]), str(config), "--work-dir", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = folder.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in log.read_text().splitlines()]


def assert_loss_falls(scalars):
    losses = [row["loss"] for row in scalars if "loss" in row]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4]), losses


def model_of(text, folder, checkpoint):
    """The model of a configuration with the weights of a checkpoint, as the packages read it."""
    from mmengine.runner import load_checkpoint

    model = build_model(packages.mmengine.Config.fromfile(folder / "config.py"))
    # The training wrote this file itself.
    load_checkpoint(model, str(checkpoint), map_location="cpu", strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    return folder, train("mmdet", DETECTOR, folder)


def test_mask_rcnn_learns_is_rated_and_reads_its_checkpoint(detector):
    folder, scalars = detector
    assert_loss_falls(scalars)
    rated = next(row for row in scalars if "coco/bbox_mAP" in row)
    assert "coco/segm_mAP" in rated
    first, second = (model_of(DETECTOR, folder, folder / "epoch_10.pth") for _ in range(2))
    x = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(first.backbone(x), second.backbone(x), strict=True))
        one, other = (model.rpn_head(model.neck(model.backbone(x)))[0] for model in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_upernet_learns_is_rated_and_reads_its_checkpoint(tmp_path):
    scalars = train("mmseg", SEGMENTOR, tmp_path)
    assert_loss_falls(scalars)
    assert any("mIoU" in row for row in scalars)
    first, second = (model_of(SEGMENTOR, tmp_path, tmp_path / "iter_20.pth") for _ in range(2))
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    meta = [{"img_shape": (96, 96), "ori_shape": (96, 96)}]
    with torch.inference_mode():
        assert torch.equal(first.encode_decode(x, meta), second.encode_decode(x, meta))


def test_detect_draws_what_the_trained_detector_finds(detector, tmp_path):
    folder, _ = detector
    tool = Path(__file__).resolve().parents[3] / "tools" / "detect.py"
    picture, drawn = PICTURES / "images" / "cat.jpg", tmp_path / "drawn.png"
    arguments = ["--config", folder / "config.py", "--checkpoint", folder / "epoch_10.pth", "-o", drawn]
    command = [sys.executable, str(tool), str(picture), *map(str, arguments), "--threshold", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Image.open(drawn).size == Image.open(picture).size
    assert not np.array_equal(np.asarray(Image.open(drawn).convert("RGB")), np.asarray(Image.open(picture)))
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(picture.read_bytes()[:50])
    command[2] = str(damaged)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and str(damaged) in done.stderr.splitlines()[-1]


def test_masks_show_the_same_polygons_as_the_instances():
    instances = json.loads((PICTURES / "instances.json").read_text())
    for image in instances["images"]:
        mask = Image.new("L", (image["width"], image["height"]))
        for annotation in instances["annotations"]:
            if annotation["image_id"] == image["id"]:
                points = np.reshape(annotation["segmentation"][0], (-1, 2))
                ImageDraw.Draw(mask).polygon([tuple(p) for p in points.tolist()], fill=annotation["category_id"])
        stored = Image.open(PICTURES / "masks" / Path(image["file_name"]).with_suffix(".png"))
        assert np.array_equal(np.asarray(mask), np.asarray(stored))
