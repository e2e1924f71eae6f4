"""Realistic scans of a known brain: the ICBM 2009a T1 template, degraded the way BrainWeb degrades its phantom.

The template and its grey- and white-matter maps ship inside nilearn. They are the symmetric release ("sym_09a"): the
right hemisphere is the exact mirror image of the left one.

Papers: "Design and construction of a realistic digital brain phantom", Collins et al., IEEE TMI 17 (1998), for noise
and non-uniformity; "The Rician distribution of noisy MRI data", Gudbjartsson and Patz, MRM 34 (1995).
Letters: X, Y, Z are the voxels of the template.
"""

import math
from dataclasses import dataclass

import nibabel
import numpy as np
import torch
from torch import Tensor

from .errors import VolumeError

LABELS = ("background", "grey matter", "white matter")

# template intensity (1 is its brightest voxel) above which a voxel shows the brain rather than the stripped outside
_BRAIN = 0.05
# highest total degree of the cosines that make up a non-uniformity field
_FIELD_DEGREE = 3


@dataclass(frozen=True)
class Phantom:
    """A brain whose tissues are known.

    Attributes:
        intensity: (X, Y, Z) float32, the T1 signal without noise, skull removed; 0 outside the brain.
        labels: (X, Y, Z) int64, 0 background with fluid, 1 grey matter, 2 white matter (`LABELS`).
        brightest: mean intensity of the brightest tissue (white matter), what noise levels refer to.
        image: the template as loaded; carries the affine and the header for files on the same grid.
    """

    intensity: Tensor
    labels: Tensor
    brightest: float
    image: nibabel.Nifti1Image

    def box(self, box_mm: list[list[float]]) -> tuple[slice, slice, slice]:
        """Slices of the voxels whose centres lie strictly inside a box.

        Args:
            box_mm: lower and upper limit in mm along x (to the right), y (forwards) and z (upwards), origin and axes
                those of the template; x < 0 is the left hemisphere.

        Raises:
            VolumeError: the box holds no voxel.
        """
        slices = []
        for axis, (low, high) in enumerate(box_mm):
            # nilearn's template has its axes along x, y, z
            start, step = self.image.affine[axis, 3], self.image.affine[axis, axis]
            inside = [i for i in range(self.labels.shape[axis]) if low < start + step * i < high]
            if not inside:
                raise VolumeError(f"box {box_mm} holds no voxel of the template along axis {axis}; enlarge it")
            slices.append(slice(inside[0], inside[-1] + 1))
        return tuple(slices)


def load_phantom(resolution_mm: int = 2) -> Phantom:
    """The ICBM 2009a template at an isotropic resolution.

    A voxel is labelled with the most probable of grey matter, white matter and background, whose probability is what
    the two maps leave of 1 (fluid included).
    """
    # nilearn takes a second to import
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    loaders = (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    images = [load(resolution=resolution_mm) for load in loaders]
    # resampling leaves traces below 0
    intensity, grey, white = (torch.from_numpy(image.get_fdata(dtype=np.float32)).clamp(min=0) for image in images)
    labels = torch.stack((1 - grey - white, grey, white)).argmax(dim=0)
    return Phantom(intensity, labels, intensity[labels == 2].mean().item(), images[0])


def nonuniformity_field(brain: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A random smooth multiplicative field like that of receiver coils.

    A sum of cosines of total degree 1 to 3 along the axes, random amplitudes falling with the degree, scaled so that it
    ranges over the brain exactly from 1 - strength / 2 to 1 + strength / 2 (BrainWeb's "40 %": 0.8 to 1.2).

    Args:
        brain: (X, Y, Z) bool, at least one voxel true.
        strength: 0 to less than 2; 0.4 is 40 %.
        generator: source of the random numbers, on the CPU.

    Returns:
        (X, Y, Z) float32.
    """
    order = torch.arange(_FIELD_DEGREE + 1)
    waves = [torch.cos(math.pi * order[:, None] * (torch.arange(size) + 0.5) / size) for size in brain.shape]
    degree = order[:, None, None] + order[:, None] + order
    amplitudes = torch.randn(degree.shape, generator=generator) / degree.clamp(min=1)
    amplitudes[(degree == 0) | (degree > _FIELD_DEGREE)] = 0
    field = torch.einsum("abc,ax,by,cz->xyz", amplitudes, *waves)
    low, high = field[brain].aminmax()
    return 1 + strength * ((field - low) / (high - low).clamp(min=torch.finfo(field.dtype).tiny) - 0.5)


def add_rician_noise(intensity: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """The magnitude of the signal with Gaussian noise of standard deviation `sigma` in both of its channels."""
    real, imaginary = torch.randn((2, *intensity.shape), generator=generator) * sigma
    return torch.hypot(intensity + real, imaginary)


def simulate_scan(
    intensity: Tensor, brightest: float, noise: float, nonuniformity: float, generator: torch.Generator
) -> Tensor:
    """A scan of the phantom, or of a part of it: non-uniformity over the brain, then Rician noise everywhere.

    Args:
        intensity: (X, Y, Z) float32, of `Phantom`.
        brightest: of `Phantom`.
        noise: standard deviation of the noise as a fraction of `brightest`; 0.09 is 9 %.
        nonuniformity: range of the field over the brain in `intensity`; 0.4 is 40 %.
        generator: source of the random numbers, on the CPU; equal generators give equal scans.

    Returns:
        (X, Y, Z) float32, not negative.
    """
    field = nonuniformity_field(intensity > _BRAIN, nonuniformity, generator)
    return add_rician_noise(intensity * field, noise * brightest, generator)
