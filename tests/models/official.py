"""Comparison of models with what the official code computed on the same weights (tests/golden, format in parity.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import parity
import timm
import torch
from families import ISOTROPIC

from vssm.models.isotropic import Isotropic, class_in_the_middle, quarter_ends

GOLDEN = Path(__file__).parents[1] / "golden"


def load_golden(file: str) -> dict:
    """The golden file of that name, without its ending."""
    return parity.load(GOLDEN / f"{file}.json")


def official_state(golden: dict) -> dict[str, torch.Tensor]:
    """The official state dict that the golden outputs were computed with."""
    return {key: torch.from_numpy(value) for key, value in parity.fill_state(golden["state"]).items()}


def meta_state(file: str) -> dict[str, torch.Tensor]:
    """The official names and shapes of a golden file, without storage."""
    return {key: torch.empty(shape, device="meta") for key, shape in load_golden(file)["state"]}


def assert_names_convert(model: torch.nn.Module, file: str) -> None:
    """Fails unless the names of that golden file become the model's, and those stay as they are."""
    own = model.convert_official(meta_state(file))
    # Golden files leave out the counters of batch normalisation, which decide nothing.
    assert own.keys() == {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    assert model.convert_official(own).keys() == own.keys()


def model_of(golden: dict, name: str | None = None, **kwargs: object) -> torch.nn.Module:
    """The registered model of a golden file, of that name unless given another, made for images of the input's size."""
    name = name or golden["name"]
    if name in ISOTROPIC:
        kwargs["img_size"] = tuple(golden["input"][2:])
    return timm.create_model(name, **kwargs)


def stages_and_logits(model: torch.nn.Module, golden: dict) -> dict[str, torch.Tensor]:
    """{"logits", "stage0", ...} of `model`, as far as the golden file has them, for its input and in its layout.

    Of isotropic models: logits, what feeds the head ("features"), and after each quarter of the blocks the residual
    stream ("stage0", ...) and what the last mixer added to it ("mixer0", ...), in the order of the sequence.
    """
    x = torch.from_numpy(parity.fill_input(golden["input"]))
    with torch.inference_mode():
        if isinstance(model, Isotropic):
            return _isotropic_taps(model, x)
        final, maps = model.forward_intermediates(x)
        got = {"logits": model.forward_head(final)} | {f"stage{i}": stage for i, stage in enumerate(maps)}
    return {tap: _as_recorded(got[tap], want) for tap, want in golden["outputs"].items() if tap in got}


def recorded_taps(model: torch.nn.Module, golden: dict, places: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """`stages_and_logits`, and the outputs of the submodules that `places` names for other taps of the golden file."""
    got = {}
    hooks = [
        model.get_submodule(place).register_forward_hook(lambda module, args, out, tap=tap: got.__setitem__(tap, out))
        for tap, place in places.items()
    ]
    whole = stages_and_logits(model, golden)
    for hook in hooks:
        hook.remove()
    return whole | {tap: _as_recorded(value, golden["outputs"][tap]) for tap, value in got.items()}


def _as_recorded(x: torch.Tensor, want: dict) -> torch.Tensor:
    """A map in either layout -> tokens (B, H*W, C) if the tap holds tokens, else the tap's order of dimensions."""
    shape = want["shape"]
    if x.ndim == 4 and len(shape) == 3:
        return x.flatten(1, 2) if x.shape[3] == shape[2] else x.flatten(2).transpose(1, 2)
    if x.ndim == 4:
        orders = [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2)]
        return next((x.permute(order) for order in orders if list(x.permute(order).shape) == shape), x)
    return x


def _isotropic_taps(model: Isotropic, x: torch.Tensor) -> dict[str, torch.Tensor]:
    final = model.forward_features(x)
    # The official attention pool belongs to the head.
    features = final if model.global_pool == "map" else model.forward_head(final, pre_logits=True)
    taps = {"logits": model(x), "features": features}
    ends = quarter_ends(len(model.blocks))
    for tap, residual in (("stage", True), ("mixer", False)):
        options = {"return_prefix_tokens": True, "output_fmt": "NLC", "intermediates_only": True, "residual": residual}
        for i, tokens in enumerate(model.forward_intermediates(x, ends, **options)):
            if model.num_prefix_tokens:
                patches, token = tokens
                tokens = class_in_the_middle(torch.cat([token, patches], dim=1))
            taps[f"{tap}{i}"] = tokens
    return taps


def assert_parity(got: dict[str, torch.Tensor], golden: dict, tolerance: float | dict[str, float]) -> None:
    """Fails unless `got` has exactly the taps of the golden file, each within the relative error `tolerance`."""
    assert got.keys() == golden["outputs"].keys()
    errors = {tap: parity.relative_error(got[tap].numpy(), want) for tap, want in golden["outputs"].items()}
    allowed = {tap: tolerance[tap] if isinstance(tolerance, dict) else tolerance for tap in errors}
    assert all(errors[tap] <= allowed[tap] for tap in errors), errors
