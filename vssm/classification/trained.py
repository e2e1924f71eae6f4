"""The file of a trained classifier: weights that timm loads, and with them what they need to be used."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

import vssm.models  # noqa: F401

from ..atomic import replaced_file


@dataclass(frozen=True)
class Trained:
    """What a file says of its weights.

    Attributes:
        model: name registered with timm.
        arguments: of `timm.create_model`.
        classes: their names; none if the data had none.
        data_config: how the model wants pictures, as `timm.data.create_transform` takes it.
        top1: in validation, percent.
        epoch: after which these weights were.
    """

    model: str
    arguments: dict[str, Any]
    classes: list[str]
    data_config: dict[str, Any]
    top1: float
    epoch: int


def write_trained(path: Path, network: nn.Module, facts: Trained) -> None:
    """Write weights and facts as safetensors, whole or not at all.

    Raises:
        OSError: the system refuses.
    """
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}
    # "format" is what transformers and timm look for
    metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in asdict(facts).items()}
    with replaced_file(path) as stream:
        stream.write(save(tensors, metadata))


def read_trained(path: Path) -> Trained | None:
    """What a file says of its weights; None if it is no file of `write_trained`."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return Trained(**{name: json.loads(metadata[name]) for name in Trained.__dataclass_fields__})
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def load_trained(path: Path, facts: Trained) -> nn.Module:
    """The network of a file in evaluation mode.

    Raises:
        ValueError: the weights do not fit the model that the file names.
    """
    try:
        model = timm.create_model(facts.model, **facts.arguments).eval()
        model.load_state_dict(load_file(path))
    except (RuntimeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path}: does not fit {facts.model} ({str(error).splitlines()[0]})") from None
    return model
