"""From a dataset's fingerprint to patch, strides, widths and batch for the memory at hand, in nnU-Net's spirit.

The plan is a file that people may edit. Rules: Isensee et al., "nnU-Net" (arXiv 1809.10486; Nature Methods 18, 2021).
Letters: x, y, z are the axes right, front, top of RAS; a patch of z = 1 means a 2-D network on slices or pictures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml

from ..training.options import Range, check_options, read_options
from ..volumes.writing import atomic_file
from .datasets import Dataset
from .fingerprint import Fingerprint

NORMALISATIONS = {
    "ct": "clip to intensity_low and intensity_high, subtract intensity_mean, divide by intensity_std",
    "zscore": "zero mean and unit variance of each channel of each case",
    "zscore_nonzero": "the same over the voxels that are not zero, for scans whose background was removed",
    "dataset": "subtract intensity_mean, divide by intensity_std",
}
_MIN_EDGE = 4
# voxels of different axes are treated alike up to this ratio of spacings, and a dataset as anisotropic beyond that
_ISOTROPIC_RATIO, _ANISOTROPIC_RATIO = 2.0, 3.0
_BASE_FEATURES = 32
_MAX_FEATURES = {2: 512, 3: 320}
_MAX_STAGES = {2: 8, 3: 6}
_LARGEST_PATCH = {2: 512**2, 3: 256**3}
# no more than this share of all voxels of the dataset in one batch
_LARGEST_BATCH_SHARE = 0.05
# Tensors of a stage's size for each residual block: those autograd keeps and a margin for the gradients in work.
# tests/segmentation/test_planning.py compares it with what autograd keeps.
_KEPT_PER_BLOCK = 8
_BYTES = {"no": 4, "bf16": 2}
_HEADER = """\
# Plan of a training run, made from fingerprint.json. It may be edited before a run; `--resume` needs it as it was.
# Sizes are in voxels and spacings in mm along the axes right, front, top (pictures: rows, columns, 1).
# normalisation is one of
"""


@dataclass(frozen=True)
class Plan:
    """Everything about the data that the network and its training depend on.

    Attributes:
        spacing: mm, to which volumes are resampled, unless they are resized.
        resize: size to which cases are resized; 0 leaves an axis as it is.
        patch_size: voxels; a last size of 1 is a 2-D network.
        batch_size: patches of one process and one accumulation step.
        normalisation: a key of `NORMALISATIONS`.
        intensity_mean, intensity_std, intensity_low, intensity_high: one per channel, see `Fingerprint`.
        features: channels of each stage.
        strides, kernel_sizes: of each stage, one number per axis of the network.
        num_blocks, num_decoder_blocks: blocks of each stage.
    """

    spacing: Annotated[list, Range(1e-4, 1e4, (3,))]
    resize: Annotated[list, Range(0, 10**5, (3,), whole=True)]
    patch_size: Annotated[list, Range(1, 10**5, (3,), whole=True)]
    batch_size: Annotated[int, Range(1, 10**5)]
    normalisation: str
    intensity_mean: Annotated[list, Range(-1e30, 1e30, (None,))]
    intensity_std: Annotated[list, Range(0, 1e30, (None,))]
    intensity_low: Annotated[list, Range(-1e30, 1e30, (None,))]
    intensity_high: Annotated[list, Range(-1e30, 1e30, (None,))]
    features: Annotated[list, Range(1, 10**5, (None,), whole=True)]
    strides: Annotated[list, Range(1, 16, (None, None), whole=True)]
    kernel_sizes: Annotated[list, Range(1, 31, (None, None), whole=True)]
    num_blocks: Annotated[list, Range(1, 100, (None,), whole=True)]
    num_decoder_blocks: Annotated[list, Range(1, 100, (None,), whole=True)]

    def __post_init__(self) -> None:
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation is {self.normalisation!r}; choose one of {', '.join(NORMALISATIONS)}")

    @property
    def is_flat(self) -> bool:
        """Whether the network is 2-D: patches are one voxel thick along the last axis."""
        return self.patch_size[2] == 1

    @property
    def spatial_dims(self) -> int:
        """Of the network."""
        return 2 if self.is_flat else 3

    @property
    def network_size(self) -> list[int]:
        """Size of a patch as the network sees it."""
        return self.patch_size[: self.spatial_dims]


def make_plan(
    fingerprint: Fingerprint,
    dataset: Dataset,
    memory: int,
    precision: str = "no",
    flat: bool = False,
    patch_size: Sequence[int] = (),
    batch_size: int = 0,
) -> Plan:
    """Choose spacing, patch, topology and batch.

    Args:
        memory: bytes that training may use.
        precision: "no" (float32) or "bf16".
        flat: a 2-D network on slices; pictures always have one.
        patch_size, batch_size: fixed from outside, or () and 0 to be planned.

    Raises:
        ValueError: not even the smallest patch fits into the memory.
    """
    flat = flat or dataset.is_pictures
    spacing = _target_spacing(fingerprint)
    sizes = np.array(fingerprint.shapes) * np.array(fingerprint.spacings) / spacing
    median = np.maximum(np.median(sizes, axis=0).round().astype(int), 1)
    if flat:
        median[2] = 1
    if len(patch_size) == 0:
        patch = _largest_patch(spacing, median, flat)
        while activation_bytes(patch, spacing, 2, precision, len(dataset.labels)) > memory:
            patch = _smaller(patch, spacing, median)
    else:
        patch = list(patch_size)
    strides, kernels = _topology(patch, spacing, exact=True)
    per_patch = activation_bytes(patch, spacing, 1, precision, len(dataset.labels))
    if batch_size == 0:
        allowed = _LARGEST_BATCH_SHARE * float(sizes.prod(axis=1).sum()) / math.prod(patch)
        batch_size = max(2, min(int(memory / per_patch), int(allowed)))
    dims, depth = (2 if flat else 3), len(strides)
    # one block in the deeper half, as the published U-Mamba networks build it from nnU-Net's plans
    half = math.ceil(depth / 2)
    normalisation = _normalisation(dataset, fingerprint)
    return Plan(
        spacing=[round(float(side), 5) for side in spacing],
        resize=[0, 0, 0],
        patch_size=[int(side) for side in patch],
        batch_size=int(batch_size),
        normalisation=normalisation,
        intensity_mean=_rounded(fingerprint.mean),
        intensity_std=_rounded(fingerprint.std),
        intensity_low=_rounded(fingerprint.low),
        intensity_high=_rounded(fingerprint.high),
        features=_features(dims, depth),
        strides=[stride[:dims] for stride in strides],
        kernel_sizes=[kernel[:dims] for kernel in kernels],
        num_blocks=[2 if stage < half else 1 for stage in range(depth)],
        num_decoder_blocks=[2 if stage < half else 1 for stage in range(depth - 1)],
    )


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan as YAML with remarks."""
    remarks = "".join(f"#   {name}: {meaning}\n" for name, meaning in NORMALISATIONS.items())
    lines = (f"{key}: {_one_line(value)}\n" for key, value in dataclasses.asdict(plan).items())
    with atomic_file(path) as stream:
        stream.write((_HEADER + remarks + "".join(lines)).encode())


def read_plan(path: Path, dataset: Dataset) -> Plan:
    """Read a plan, which may have been edited.

    Raises:
        ValueError: an entry is unknown, missing or out of range, or there are not as many intensities as channels.
    """
    plan = read_options(Plan, path, ())
    check_plan(plan, dataset)
    return plan


def check_plan(plan: Plan, dataset: Dataset) -> None:
    """Raise ValueError unless the entries of a plan fit each other and the dataset."""
    check_options(plan)
    for name in ("intensity_mean", "intensity_std", "intensity_low", "intensity_high"):
        if len(getattr(plan, name)) != len(dataset.channels):
            raise ValueError(
                f"{name} has {len(getattr(plan, name))} entries, the dataset {len(dataset.channels)} channels; "
                "give one for each"
            )
    depth = len(plan.features)
    for name, count in (
        ("strides", depth),
        ("kernel_sizes", depth),
        ("num_blocks", depth),
        ("num_decoder_blocks", depth - 1),
    ):
        if len(getattr(plan, name)) != count:
            raise ValueError(f"{name} has {len(getattr(plan, name))} entries; {count} fit the {depth} features")
    if dataset.is_pictures and not plan.is_flat:
        raise ValueError(f"patch_size is {plan.patch_size}; pictures need patches of rows, columns, 1")


def fitting_patch(plan: Plan, share: float) -> list[int]:
    """The patch to try when only `share` (0 to 1) of what this plan needs is at hand: cut along its longest axes."""
    patch = list(plan.patch_size)
    steps = [math.prod(axis) for axis in zip(*plan.strides, strict=True)]
    wanted = share * math.prod(patch)
    while math.prod(patch) > wanted:
        axes = [axis for axis, step in enumerate(steps) if patch[axis] >= 2 * step]
        if not axes:
            break
        longest = max(axes, key=lambda axis: patch[axis])
        patch[longest] -= steps[longest]
    return patch


def activation_bytes(
    patch: Sequence[int], spacing: Sequence[float], batch: int, precision: str, num_labels: int
) -> int:
    """Memory in bytes that training the planned residual U-Net on one batch takes, without weights and optimizer."""
    strides, _ = _topology(list(patch), spacing)
    features = _features(2 if patch[2] == 1 else 3, len(strides))
    voxels, values = math.prod(patch), 0
    half = math.ceil(len(strides) / 2)
    for stage, (stride, width) in enumerate(zip(strides, features, strict=True)):
        voxels /= math.prod(stride)
        values += voxels * width * _KEPT_PER_BLOCK * 2 * (2 if stage < half else 1)
    # logits, softmax, one-hot labels and their gradients are float32
    return int(batch * (values * _BYTES[precision] + math.prod(patch) * num_labels * 4 * 6))


def _target_spacing(fingerprint: Fingerprint) -> np.ndarray:
    spacings, shapes = np.array(fingerprint.spacings), np.array(fingerprint.shapes)
    target = np.median(spacings, axis=0)
    worst = int(target.argmax())
    others = [axis for axis in range(3) if axis != worst]
    thick = target[worst] > _ANISOTROPIC_RATIO * target[others].min()
    few = np.median(shapes[:, worst]) * _ANISOTROPIC_RATIO < np.median(shapes[:, others], axis=0).min()
    if thick and few:
        # thick slices: the finer ones of the dataset, so that few cases lose detail
        target[worst] = max(np.percentile(spacings[:, worst], 10), target[others].max())
    return target


def _largest_patch(spacing: np.ndarray, median: np.ndarray, flat: bool) -> list[int]:
    """Of the same extent in mm along every axis, not beyond the median case, fit for its own strides."""
    dims = 2 if flat else 3
    sides = 1 / spacing[:dims]
    sides *= (_LARGEST_PATCH[dims] / sides.prod()) ** (1 / dims)
    patch = np.minimum(np.maximum(sides.round(), _MIN_EDGE), np.maximum(median[:dims], _MIN_EDGE)).astype(int).tolist()
    return _divisible(patch + [1] * (3 - dims), spacing)


def _divisible(patch: list[int], spacing: Sequence[float]) -> list[int]:
    """Rounded up so that the strides chosen for it divide it; more than one voxel stays at the deepest stage."""
    steps = [math.prod(axis) for axis in zip(*_topology(patch, spacing)[0], strict=True)]
    return [math.ceil(side / step) * step for side, step in zip(patch, steps, strict=True)]


def _smaller(patch: list[int], spacing: np.ndarray, median: np.ndarray) -> list[int]:
    """One step shorter along the axis that covers most of the median case."""
    steps = [math.prod(axis) for axis in zip(*_topology(patch, spacing)[0], strict=True)]
    axes = [axis for axis in range(3) if patch[axis] - steps[axis] >= _MIN_EDGE]
    if not axes:
        raise ValueError(f"not even a patch of {patch} fits into the memory; raise the option memory_gb")
    longest = max(axes, key=lambda axis: patch[axis] / median[axis])
    shorter = [side - steps[axis] * (axis == longest) for axis, side in enumerate(patch)]
    rounded = _divisible(shorter, spacing)
    # rounding up for fewer strides must not undo the step
    return rounded if math.prod(rounded) < math.prod(patch) else shorter


def _topology(
    patch: Sequence[int], spacing: Sequence[float], exact: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernel sizes of each stage: axes are halved, the finest first, while 4 voxels are left.

    Args:
        exact: never halve an odd size, for patches that are not to be rounded up.
    """
    flat = patch[2] == 1
    dims = 2 if flat else 3
    sides, lengths = list(patch), list(spacing)
    strides, kernels, kernel = [], [], [1, 1, 1]
    stride = [1, 1, 1]
    while True:
        finest = min(lengths[:dims])
        # thin axes get kernels of 3 once the others have become as coarse
        kernel = [
            3 if axis < dims and (kernel[axis] == 3 or lengths[axis] < _ISOTROPIC_RATIO * finest) else 1
            for axis in range(3)
        ]
        strides.append(stride)
        kernels.append(kernel)
        able = [axis for axis in range(dims) if sides[axis] >= 2 * _MIN_EDGE and not (exact and sides[axis] % 2)]
        if not able or len(strides) >= _MAX_STAGES[dims]:
            break
        finest = min(lengths[axis] for axis in able)
        halved = [axis in able and lengths[axis] < _ISOTROPIC_RATIO * finest for axis in range(3)]
        stride = [2 if half else 1 for half in halved]
        sides = [side / step for side, step in zip(sides, stride, strict=True)]
        lengths = [length * step for length, step in zip(lengths, stride, strict=True)]
    if len(strides) == 1:
        # a U-Net has at least two stages
        stride = [2 if axis < dims and sides[axis] >= 2 else 1 for axis in range(3)]
        strides.append(stride)
        kernels.append(kernels[-1])
    return strides, kernels


def _features(dims: int, depth: int) -> list[int]:
    return [min(_BASE_FEATURES * 2**stage, _MAX_FEATURES[dims]) for stage in range(depth)]


def _normalisation(dataset: Dataset, fingerprint: Fingerprint) -> str:
    if dataset.is_pictures:
        return "dataset"
    if [channel.upper() for channel in dataset.channels] == ["CT"]:
        return "ct"
    # nnU-Net's rule for skull-stripped heads and the like
    return "zscore_nonzero" if fingerprint.zero_share > 0.25 else "zscore"


def _one_line(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).partition("\n")[0]


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
