"""The network and its loss: the class that the options name, with what the plan says of its sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import monai.networks.nets
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn

import vssm.networks

from .datasets import Dataset
from .options import TrainingOptions
from .planning import Plan

_PACKAGES = {"vssm.networks": vssm.networks, "monai.networks.nets": monai.networks.nets}
_PLANNED = ("features", "strides", "kernel_sizes", "num_blocks", "num_decoder_blocks")
_SMOOTH = 1e-5


def define_network(options: TrainingOptions, plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """The entry `network_def` of a bundle: `_target_` and plain arguments.

    Classes of vssm that are built from nnU-Net's plans get stages from the plan; every class gets what it has an
    argument for of spatial_dims, in_channels, out_channels, img_size and deep_supervision; the options' win.

    Raises:
        ValueError: there is no such class.
    """
    network_class = _network_class(options.network)
    taken = inspect.signature(network_class).parameters
    known = {
        "spatial_dims": plan.spatial_dims,
        "in_channels": len(dataset.channels),
        "out_channels": len(dataset.labels),
        "img_size": plan.network_size,
        "deep_supervision": options.deep_supervision,
    }
    arguments = {name: value for name, value in known.items() if name in taken}
    if hasattr(network_class, "from_plans"):
        arguments |= {name: getattr(plan, name) for name in _PLANNED if name in taken}
    return {"_target_": options.network, **arguments, **options.network_arguments}


def build_network(definition: dict[str, Any]) -> nn.Module:
    """Build what `define_network` describes.

    Raises:
        ValueError: the class does not take these arguments.
    """
    arguments = {name: value for name, value in definition.items() if name != "_target_"}
    try:
        return _network_class(definition["_target_"])(**arguments)
    # what constructors raise for arguments that are unknown or do not fit
    except (TypeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(f"{definition['_target_']} does not take {arguments} ({error}); correct them") from None


def make_loss(options: TrainingOptions) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """Loss of (logits at every resolution, the highest first) against labels (B, 1, *size).

    Dice plus cross entropy; under deep supervision weighted 1, 1/2, 1/4, ... with 0 for the lowest of several
    resolutions, normalised to a sum of 1, as nnU-Net does.
    """
    single = DiceCELoss(
        include_background=options.dice_background,
        to_onehot_y=True,
        softmax=True,
        squared_pred=options.dice_squared,
        batch=options.dice_batch,
        smooth_nr=_SMOOTH,
        smooth_dr=_SMOOTH,
        lambda_dice=options.dice_weight,
        lambda_ce=options.ce_weight,
    )

    def loss(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        if len(outputs) == 1:
            return single(outputs[0].float(), labels)
        weights = [0.5**level for level in range(len(outputs) - 1)] + [0.0]
        weights = [weight / sum(weights) for weight in weights]
        supervised = DeepSupervisionLoss(single, weights=weights)
        # MONAI resizes labels with a floating-point interpolation
        return supervised([output.float() for output in outputs], labels.float())

    return loss


def _network_class(target: str) -> type[nn.Module]:
    package, _, name = target.rpartition(".")
    found = getattr(_PACKAGES.get(package), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        names = ", ".join(f"vssm.networks.{name}" for name in vssm.networks.__all__)
        raise ValueError(f"network {target!r} is unknown; choose {names} or a class of monai.networks.nets")
    return found
