"""What networks with a VMamba encoder need to start from weights that were trained on RGB images."""

import os
from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..checkpoint import linear_from_pointwise, remap, state_dict_of
from ..models import vmamba


def grey_to_rgb(x: Tensor, in_channels: int) -> Tensor:
    """`x`, but an image of one channel three times if the network is one of three, as in the official networks."""
    return x.expand(-1, 3, *x.shape[2:]) if in_channels == 3 and x.ndim > 1 and x.shape[1] == 1 else x


def stem_for_grey(state_dict: Mapping[str, Tensor], key: str, in_channels: int) -> dict[str, Tensor]:
    """`state_dict`, but for a network of one channel an RGB convolution under `key` summed over its channels.

    That gives what the RGB convolution gives for the one channel three times.
    """
    weight = state_dict.get(key)
    if in_channels == 1 and weight is not None and weight.shape[1] == 3:
        return {**state_dict, key: weight.sum(1, keepdim=True)}
    return dict(state_dict)


def encoder_state(encoder: nn.Module, weights: str | os.PathLike | Mapping, in_channels: int) -> dict[str, Tensor]:
    """What a VMamba checkpoint, official or vssm's own, holds for `encoder`, under names `stem.*` and `stages.*`.

    The classifier and the norm before it are left out. An RGB stem is adapted to other `in_channels` as timm does it:
    summed for one channel, else repeated and scaled.
    """
    state = remap(state_dict_of(weights), [*vmamba.OFFICIAL_NAMES, (r"^(norm|head)\.", None)])
    stem = state.get("stem.conv1.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] == 3:
        state["stem.conv1.weight"] = adapt_input_conv(in_channels, stem)
    return linear_from_pointwise(encoder, state)
