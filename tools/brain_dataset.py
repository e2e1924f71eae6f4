"""Write a small data set of real anatomy to train and to be measured on: brain tissue in degraded scans of a template.

Scans to learn from show the left half of the ICBM 2009a T1 template, the one to be measured on shows the right half;
grey and white matter are labelled. Noise and non-uniformity are drawn anew for every scan, as in demo_brain.py. The
template is mirror-symmetric: the right half is new in noise and field, not in anatomy. The folder is laid out as
nnU-Net wants it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor

from vssm.cli.common import WRONG_INPUT, Parser
from vssm.volumes.errors import VolumeError
from vssm.volumes.phantom import LABELS, Phantom, load_phantom, simulate_scan
from vssm.volumes.writing import atomic_file

EXAMPLE = """example:
  python tools/brain_dataset.py brain
  python tools/train_segmenter.py --config configs/medical/brain.yaml --output runs/brain"""
# Millimetres along right, front, top; 0 is the middle of the brain.
LEFT, RIGHT = [[-200, 0], [-200, 200], [-200, 200]], [[0, 200], [-200, 200], [-200, 200]]
NOISE, NONUNIFORMITY = 0.09, 0.4


def write(folder: Path, cases: int, resolution_mm: int, seed: int) -> None:
    """Write `cases` scans to learn from and one to be measured on, at `resolution_mm` a voxel.

    Raises:
        VolumeError: the folder has a data set already.
    """
    if (folder / "dataset.json").exists():
        raise VolumeError(f"{folder}: there is a data set already; remove it or name another folder")
    phantom = load_phantom(resolution_mm)
    generator = torch.Generator().manual_seed(seed)
    for number in range(cases):
        # The smallest boxes that hold the halves: what is outside must not be seen.
        _write_case(phantom, LEFT, generator, folder, "Tr", f"left{number}")
    _write_case(phantom, RIGHT, generator, folder, "Ts", "right")
    content = {
        "channel_names": {"0": "MR"},
        "labels": {name: label for label, name in enumerate(LABELS)},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    _put(folder / "dataset.json", json.dumps(content, indent=1).encode() + b"\n")


def _write_case(phantom: Phantom, box_mm: list, generator: torch.Generator, folder: Path, part: str, name: str) -> None:
    box = phantom.box(box_mm)
    scan = simulate_scan(phantom.intensity[box], phantom.brightest, NOISE, NONUNIFORMITY, generator)
    affine = phantom.image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [axis.start for axis in box]
    _put(folder / f"images{part}" / f"{name}_0000.nii.gz", _nifti(scan, np.float32, affine))
    _put(folder / f"labels{part}" / f"{name}.nii.gz", _nifti(phantom.labels[box], np.uint8, affine))


def _nifti(voxels: Tensor, dtype: type, affine: np.ndarray) -> bytes:
    image = nibabel.Nifti1Image(voxels.numpy().astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(content)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = Parser(
        prog="brain_dataset.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write")
    parser.add_argument("--cases", type=int, choices=range(2, 101), default=4, metavar="N", help="scans to learn from")
    parser.add_argument(
        "--resolution", type=int, choices=range(1, 9), default=2, metavar="MM", help="of a voxel, in mm"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and non-uniformity")
    given = parser.parse_args(arguments)
    try:
        write(given.folder, given.cases, given.resolution, given.seed)
    except (VolumeError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    print(f"wrote {given.folder}: {given.cases} scans of the left half, 1 of the right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
