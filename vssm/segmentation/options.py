"""The options of a training run: the keys of configs/medical/*.yaml and what they default to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..training.options import Choice, Range

_SIZE = Range(1, 10**5, (3,), whole=True)
_SHARE = Range(0, 1)
_WEIGHT = Range(0, 1e6)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `vssm.segmentation.train`; lists and numbers that say "planned" are found from the data.

    Attributes:
        data: folder or datalist, see `vssm.segmentation.datasets.read_dataset`.
        channels, labels, label_suffix: see there; empty: as dataset.json says.
        network: class of vssm.networks or monai.networks.nets, such as vssm.networks.UMambaBot.
        network_arguments: its arguments that are not planned; they win over the plan's.
        seed: of weights, folds and patches.
        folds, fold: cross-validation; fold -1 trains and validates on every case.
        flat: a 2-D network on the slices across the last axis (top).
        spacing: mm along right, front, top (default: planned).
        resize: size to which cases are resized instead of resampled to a spacing, 0 leaves an axis: rows, columns and
            1 of pictures, for example [256, 256, 1]; slices of volumes, for example [224, 224, 0].
        patch_size: voxels along right, front, top (default: planned).
        batch_size: patches of a process (default 0: planned).
        normalisation: a key of `vssm.segmentation.planning.NORMALISATIONS`, or "planned".
        memory_gb: of the device for planning (default 0: what is free).
        accumulation: batches whose gradients make one step.
        epochs, steps_per_epoch: length of the training.
        optimizer: "sgd" (Nesterov) or "adamw".
        learning_rate, momentum, weight_decay: of the optimizer, on every parameter.
        schedule: "poly" or "cosine", see `vssm.segmentation.schedule`.
        poly_power, cosine_epochs, lowest_rate, warmup_epochs, per_epoch: of the schedule; cosine_epochs 0 is all.
        max_gradient: norm to which longer gradients are cut.
        dice_weight, ce_weight: of the two parts of the loss.
        dice_background, dice_squared, dice_batch: the Dice part counts the background; squares in its denominator;
            pools the batch.
        deep_supervision: train on the logits of every resolution.
        average_decay: share of the exponential moving average of the weights that a step keeps; 0: no average.
        foreground_share: of the patches, centred on a labelled voxel of a random label.
        augmentation: "nnunet", "flips", "pictures" (flips and rotations of colour pictures) or "none".
        mirror_axes: axes along which patches are mirrored.
        precision: "no" (float32) or "bf16".
        validate_every: epochs between validations; the last epoch is always validated.
        overlap: of the windows in validation.
        worst_cases: how many are drawn at the end.
        workers: processes that prepare patches.
        cpu: do not use an accelerator.
    """

    data: str
    channels: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    label_suffix: str = ""
    network: str = "vssm.networks.UMambaBot"
    network_arguments: dict = field(default_factory=dict)
    seed: Annotated[int, Range(0, 2**31)] = 0
    folds: Annotated[int, Range(1, 1000)] = 5
    fold: Annotated[int, Range(-1, 999)] = 0
    flat: bool = False
    spacing: Annotated[list, Range(1e-3, 1e3, (3,))] = field(default_factory=list)
    resize: Annotated[list, Range(0, 10**5, (3,), whole=True)] = field(default_factory=list)
    patch_size: Annotated[list, _SIZE] = field(default_factory=list)
    batch_size: Annotated[int, Range(0, 10**4)] = 0
    normalisation: Annotated[str, Choice(("planned", "ct", "zscore", "zscore_nonzero", "dataset"))] = "planned"
    memory_gb: Annotated[float, Range(0, 1e4)] = 0.0
    accumulation: Annotated[int, Range(1, 1000)] = 1
    epochs: Annotated[int, Range(1, 10**6)] = 1000
    steps_per_epoch: Annotated[int, Range(1, 10**6)] = 250
    optimizer: Annotated[str, Choice(("sgd", "adamw"))] = "sgd"
    learning_rate: Annotated[float, Range(1e-9, 10)] = 0.01
    momentum: Annotated[float, Range(0, 0.9999)] = 0.99
    weight_decay: Annotated[float, Range(0, 1)] = 3e-5
    schedule: Annotated[str, Choice(("poly", "cosine"))] = "poly"
    poly_power: Annotated[float, Range(0, 10)] = 0.9
    cosine_epochs: Annotated[int, Range(0, 10**6)] = 0
    lowest_rate: Annotated[float, Range(0, 10)] = 0.0
    warmup_epochs: Annotated[int, Range(0, 10**6)] = 0
    per_epoch: bool = False
    max_gradient: Annotated[float, Range(1e-3, 1e9)] = 12.0
    dice_weight: Annotated[float, _WEIGHT] = 1.0
    ce_weight: Annotated[float, _WEIGHT] = 1.0
    dice_background: bool = False
    dice_squared: bool = False
    dice_batch: bool = False
    deep_supervision: bool = True
    average_decay: Annotated[float, Range(0, 0.99999)] = 0.0
    foreground_share: Annotated[float, _SHARE] = 0.33
    augmentation: Annotated[str, Choice(("nnunet", "flips", "pictures", "none"))] = "nnunet"
    mirror_axes: Annotated[list, Range(0, 2, (None,), whole=True)] = field(default_factory=lambda: [0, 1, 2])
    precision: Annotated[str, Choice(("no", "bf16"))] = "no"
    validate_every: Annotated[int, Range(1, 10**6)] = 10
    overlap: Annotated[float, Range(0, 0.95)] = 0.5
    worst_cases: Annotated[int, Range(1, 20)] = 4
    workers: Annotated[int, Range(0, 256)] = 0
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.dice_weight + self.ce_weight == 0:
            raise ValueError("dice_weight and ce_weight are both 0; one of them must be more")
