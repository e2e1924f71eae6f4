"""What a file of weights is, in numbers that anyone can compare."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..checkpoint import load_official, read_wrapped
from ..zoo import Weights
from .models import is_dense, load

# of the source tree, which has the configurations
SOURCES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Verified:
    """What was found in a file.

    Attributes:
        model: of the row, with the weights; of a detector or segmenter its backbone.
        wrappers: keys that hold weights in the file, the one that was read first; none if they lie bare.
        matched: tensors that the model took.
        others: tensors of a detector or segmenter outside its backbone's stages, which nothing here needs.
        whole: tensors of the whole detector or segmentor, if they all match; None where OpenMMLab's packages or the
            configuration (in the source tree) are not there, and for other rows.
        outputs: what the model makes of the parity input: {"logits"} or {"stage0", ...}.
    """

    model: nn.Module
    wrappers: tuple[str, ...]
    matched: int
    others: int
    whole: int | None
    outputs: Mapping[str, Tensor]


def parity_input(shape: tuple[int, ...]) -> Tensor:
    """The input of the recorded outputs in tests/golden: standard normal numbers from NumPy's frozen generator."""
    numbers = np.random.RandomState(zlib.crc32(b"input/0") & 0xFFFFFFFF)
    return torch.from_numpy(numbers.standard_normal(shape).astype(np.float32))


def verify(facts: Weights, path: Path) -> Verified:
    """Read a file, load it strictly into the model of its row, and run the parity input through it (float32, CPU).

    Raises:
        ValueError: the file is damaged or hostile, a name or shape does not match, or outputs are not finite.
        FileNotFoundError: there is no such file.
    """
    wrappers, state = read_wrapped(path)
    model, own = load(facts, state)
    size = facts.input_size or timm.get_pretrained_cfg(facts.model_name).input_size
    x = parity_input((1, *size))
    with torch.inference_mode():
        if is_dense(facts):
            maps = model.forward_intermediates(x, intermediates_only=True)
            outputs = {f"stage{i}": stage for i, stage in enumerate(maps)}
        else:
            outputs = {"logits": model(x)}
    for name, output in outputs.items():
        if not bool(torch.isfinite(output).all()):
            raise ValueError(f"{path} loads, but {name} for the parity input is not finite; the weights are damaged")
    others = len(state) - len(own) if is_dense(facts) else 0
    return Verified(model, tuple(wrappers), len(own), others, _whole(facts, state), outputs)


def _whole(facts: Weights, state: Mapping[str, Tensor]) -> int | None:
    config = SOURCES / facts.config
    if not is_dense(facts) or not config.is_file():
        return None
    try:
        from mmengine import Config

        from ..integrations.openmmlab import build_model

        model = build_model(Config.fromfile(config, import_custom_modules=False))
    except ImportError:
        return None
    load_official(model, state)
    return len(model.state_dict())


def numbers_of(output: Tensor) -> str:
    """An output in a line: its shape, mean, standard deviation and first values."""
    values = " ".join(f"{value:.5g}" for value in output.flatten()[:4].tolist())
    shape = " x ".join(map(str, output.shape))
    return f"{shape}: mean {output.mean():.6g}, standard deviation {output.std():.6g}, first {values}"
