"""Small folders of labelled pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(root: Path, folders: dict[str, list[int]], size: tuple[int, int] = (40, 36)) -> Path:
    """One grey picture of each brightness per class folder; returns `root`."""
    for name, values in folders.items():
        (root / name).mkdir(parents=True)
        for i, value in enumerate(values):
            Image.fromarray(np.full((*size, 3), value, np.uint8)).save(root / name / f"{i}.png")
    return root
