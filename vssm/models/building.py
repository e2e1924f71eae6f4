"""How every registered model is built: timm's builder, official checkpoint files, and what to do without a network."""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from ..checkpoint import check_match, official_pickles, unwrap

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

    `kwargs` are the constructor's arguments and timm's own (`features_only`, `pretrained_cfg`, ...).

    Raises:
        RuntimeError: the published weights cannot be downloaded; the message names their address, where to put the
            file by hand and how to load it.
        ValueError: the file does not fit the model.
    """
    settings = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    cfg = resolve_pretrained_cfg(name, *settings) if pretrained else None
    if cfg and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(_by_hand(name, cfg, "its authors offer no direct download"))
    with official_pickles():
        try:
            return build_model_with_cfg(
                model,
                name,
                pretrained,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg=dict(feature_cfg),
                **kwargs,
            )
        # urllib's errors are OSErrors: no network, no such host, HTTP status, broken connection.
        except OSError as error:
            if cfg is None or cfg.file or cfg.state_dict or not cfg.url:
                raise
            raise RuntimeError(_by_hand(name, cfg, str(error))) from error


def _by_hand(name: str, cfg: PretrainedCfg, reason: str) -> str:
    """Why the weights of `name` did not come by themselves, and what to do instead."""
    load = f'timm.create_model("{name}", pretrained=True, pretrained_cfg_overlay=dict(file="PATH"))'
    if cfg.url:
        cache = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(cfg.url).path))
        return (
            f"the weights of {name} could not be downloaded from {cfg.url} ({reason}). Download that file by hand, "
            f"save it as {cache} and call again, or save it anywhere and call {load}"
        )
    places = " ".join(cfg.notes or ()) or cfg.origin_url or "the address is not known"
    return f"the weights of {name} could not be downloaded: {reason}. Get them by hand ({places}) and call {load}"


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
