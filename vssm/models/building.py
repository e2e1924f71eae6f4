"""How every registered model is built: timm's builder, official checkpoint files, and what to do without a network."""

import os
from collections.abc import Mapping
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from .. import zoo
from ..checkpoint import check_match, read_checkpoint, unwrap
from ..weights import WeightsError, fetch, get

PYRAMID_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True}


def imagenet_cfg(url: str, **settings: object) -> dict:
    """A `default_cfgs` entry for weights trained on ImageNet-1k at 224 x 224.

    Args:
        url: where the file can be downloaded; "" where its authors offer a page to a person only, which `origin_url`
            or `notes` then names.
        settings: timm's `PretrainedCfg` fields to add or to replace.
    """
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        **settings,
    }


def build(
    model: type[nn.Module], name: str, pretrained: bool, feature_cfg: Mapping = PYRAMID_FEATURES, **kwargs: object
) -> nn.Module:
    """timm's `build_model_with_cfg` for a registered `name`, able to read official checkpoint files.

    `kwargs` are the constructor's arguments and timm's own (`features_only`, `pretrained_cfg`, `cache_dir`, ...).
    Weights come from the file that the configuration names, from one that `vssm zoo add` kept, or by a download, whose
    hash is compared with the one of its first use (see `vssm.weights`).

    Raises:
        RuntimeError: the published weights cannot be downloaded or have another hash than before; the message names
            their address, where to put the file by hand and how to load it.
        ValueError: the file is damaged, names code, or does not fit the model.
    """
    cfg = None
    if pretrained:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        # weights in memory, on the Hugging Face hub or in a folder of its form are timm's business
        if cfg.state_dict or cfg.source in ("hf-hub", "local-dir") or (cfg.hf_hub_id and not cfg.file):
            cfg = None
    if cfg is not None:
        state = read_checkpoint(cfg.file or _fetched(name, cfg, kwargs.get("cache_dir")))
        kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": state}
    built = build_model_with_cfg(
        model, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=dict(feature_cfg), **kwargs
    )
    if cfg is not None:
        # timm keeps its configuration with the model, and inside the wrapper that returns features
        for holder in (built, getattr(built, "model", built)):
            holder.pretrained_cfg.pop("state_dict", None)
    return built


def _fetched(name: str, cfg: PretrainedCfg, folder: str | os.PathLike | None) -> Path:
    """The file of the weights of `cfg`, kept or downloaded now."""
    folder = Path(folder) if folder else None
    facts = zoo.published().get(f"{name}.{cfg.tag}")
    try:
        if facts is not None and facts.url == (cfg.url or ""):
            return get(facts, folder).path
        if cfg.url:
            return fetch(cfg.url, folder).path
        reason = f"none are known with the tag {cfg.tag}"
    # the folder cannot be written to, or what is downloaded is not what it must be
    except (OSError, WeightsError) as error:
        reason = str(error)
    raise RuntimeError(
        f"the weights of {name} cannot be loaded: {reason}. Or save the file anywhere and call "
        f'timm.create_model("{name}", pretrained=True, pretrained_cfg_overlay=dict(file="PATH"))'
    )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official or own state dict, possibly still wrapped -> own names, complete and of the right shapes.

    Raises:
        ValueError: anything but the first convolution and the classifier, which timm adapts, does not match.
    """
    state_dict = model.convert_official(unwrap(state_dict))
    heads = model.pretrained_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    check_match(model, state_dict, adaptable=(model.pretrained_cfg["first_conv"], *heads))
    return state_dict
