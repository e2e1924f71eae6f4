"""Tiny data sets on disk: volumes with a bright ball and a dark box, pictures with a coloured disc."""

import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

SHAPE = (20, 18, 14)
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])
NAMES = {"background": 0, "ball": 1, "box": 2}


def volume(seed, shape=SHAPE):
    """(image float32, labels uint8): noise, a bright ball and a dark box at random places."""
    rng = np.random.default_rng(seed)
    image = rng.normal(100, 10, shape).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    centre = [rng.integers(6, side - 6) for side in shape]
    distance = sum((axis - middle) ** 2 for axis, middle in zip(np.indices(shape), centre, strict=True))
    labels[distance < 16] = 1
    corner = [rng.integers(0, side - 4) for side in shape]
    labels[tuple(slice(start, start + 4) for start in corner)] = 2
    image[labels == 1] += 80
    image[labels == 2] -= 60
    return image, labels


def save(array, path, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_nnunet(folder: Path, cases=4, channels=1, modality="MR") -> Path:
    """An nnU-Net raw folder."""
    for number in range(cases):
        image, labels = volume(number)
        for channel in range(channels):
            save(image + channel, folder / "imagesTr" / f"case{number}_{channel:04d}.nii.gz")
        save(labels, folder / "labelsTr" / f"case{number}.nii.gz")
    content = {
        "channel_names": {str(channel): modality for channel in range(channels)},
        "labels": NAMES,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_pictures(folder: Path, cases=4) -> Path:
    """RGB pictures with black and white masks, as ISIC names them."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rows, columns = np.indices((40, 48))
    for number in range(cases):
        rng = np.random.default_rng(number)
        pixels = rng.integers(150, 200, (40, 48, 3)).astype(np.uint8)
        mask = (rows - rng.integers(12, 28)) ** 2 + (columns - rng.integers(12, 36)) ** 2 < 64
        pixels[mask] //= 2
        Image.fromarray(pixels).save(folder / "images" / f"ISIC_{number:04d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"ISIC_{number:04d}_segmentation.png")
    return folder
