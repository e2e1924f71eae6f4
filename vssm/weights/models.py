"""The model of a row of the zoo, with its weights: built, converted, strictly loaded."""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
from torch import Tensor, nn

import vssm.models  # noqa: F401

from ..checkpoint import check_match
from ..zoo import Weights

# Where detectors and segmenters of OpenMMLab have their backbone, and what such a backbone has instead of the
# classifier and the norm before it.
_BACKBONE = "backbone."
_LEVEL_NORMS = "outnorm"
_WITHOUT_CLASSIFIER = ("norm", "head")


def build(facts: Weights) -> nn.Module:
    """The model of a row, in evaluation mode, with random weights: of a detector or segmenter its backbone.

    Raises:
        ValueError: vssm.networks cannot be imported.
    """
    if timm.is_model(facts.model_name):
        return timm.create_model(facts.model_name).eval()
    try:
        from vssm import networks
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; run pip install "vssm[medical]"') from None
    return getattr(networks, facts.model_name)(**facts.arguments).eval()


def is_dense(facts: Weights) -> bool:
    """Whether the file holds a whole detector or segmenter, of which only the backbone is a model of vssm."""
    return facts.task in ("detection", "segmentation")


def own_names(facts: Weights, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official or own names -> those of `model`, which must be all there and of the right shapes.

    Of a whole detector or segmenter only the backbone is taken.

    Raises:
        ValueError: names or shapes that do not match, the first ten listed.
    """
    if not is_dense(facts):
        state = model.convert_official(state)
        check_match(model, state)
        return state
    parts = {key.removeprefix(_BACKBONE): value for key, value in state.items() if key.startswith(_BACKBONE)}
    if not parts:
        raise ValueError(f"no name begins with {_BACKBONE}; {facts.name} must be a whole {facts.task} model")
    state = model.convert_official({key: value for key, value in parts.items() if not key.startswith(_LEVEL_NORMS)})
    check_match(model, state, adaptable=_WITHOUT_CLASSIFIER)
    return state


def load(facts: Weights, state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a row with the weights of its file, and what it took from there, in its names.

    Raises:
        ValueError: as `build` and `own_names`.
    """
    model = build(facts)
    own = own_names(facts, model, state)
    model.load_state_dict(own, strict=False)
    return model, own


def meta_model(facts: Weights) -> nn.Module:
    """The model of a row without storage, to compare names and shapes with."""
    with torch.device("meta"):
        return build(facts)
