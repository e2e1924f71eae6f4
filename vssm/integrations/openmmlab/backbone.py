"""One class that makes every vssm backbone one of OpenMMLab's.

Level i is the output of stage i (of a block for Vim and LBVim) after a LayerNorm of its own, as the authors' detectors
and segmentors have it; facts in the papers' repositories, which patch OpenMMLab for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import vssm  # noqa: F401  registers the models
from vssm.checkpoint import load_strictly, state_dict_of
from vssm.models.isotropic import Isotropic

_EPS = 1e-5
# Names of the official wrappers: LBVim numbers by level with an underscore, the others by stage without.
_LEVEL_NAMES = re.compile(r"^(outnorm|out_map)_?(\d+)\.")
_CLASSIFIER = re.compile(r"^(norm|head|attn_pool)\.")


@MODELS.register_module()
class VSSMBackbone(BaseModule):
    """A vssm model that gives the maps of chosen levels.

    Args:
        name: registered name, with or without the tag of published weights ("vmamba_tiny", "vssd_tiny.mesa_in1k").
        out_indices: levels to give out: stages of a pyramid, blocks of Vim and LBVim.
        out_norm: a LayerNorm over channels on every level, `outnorm{i}`: i is the stage, or the place in `out_indices`
            for Vim and LBVim. False gives the maps as they are (Vim's segmentors, encoders of one's own).
        out_channels: width to which a linear layer `out_map{i}` brings every level first; None for none.
        residual: of Vim and LBVim; False gives what the block's mixer adds alone, as LBVim's and Vim-tiny's do.
        block_norm: "layer" makes the norms of Vim's and LBVim's blocks LayerNorms with a bias, as LBVim's segmentors
            have them; None keeps the model's.
        frozen_stages: 0 freezes the stem, n the stem and the first n stages (blocks of Vim and LBVim), -1 nothing.
        norm_eval: keep the statistics of batch norms while training.
        with_cp: recompute blocks in the backward pass.
        pretrained: take the published weights that timm knows for `name`.
        init_cfg: of mmengine; `dict(type="Pretrained", checkpoint=FILE, prefix="backbone.")` reads a classifier's or a
            detector's file, the authors' or vssm's, and executes nothing in it; levels' norms may be missing.
        settings: the model's own, such as `drop_path_rate`, `img_size`, `in_chans`.

    Raises:
        ValueError: an unknown name, a level that does not exist, an option the model does not have.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        out_channels: int | None = None,
        residual: bool = True,
        block_norm: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: bool = False,
        init_cfg: dict | None = None,
        **settings: Any,
    ):
        super().__init__(init_cfg)
        if not timm.is_model(name.partition(".")[0]):
            raise ValueError(f"name: no model is called {name!r}; see vssm list and timm.list_models()")
        if block_norm not in (None, "layer"):
            raise ValueError(f"block_norm must be 'layer' or None, got {block_norm!r}")
        if block_norm:
            settings["norm_layer"] = nn.LayerNorm
        model = timm.create_model(name, pretrained=False, num_classes=0, **settings)
        self.isotropic = isinstance(model, Isotropic)
        if not self.isotropic and (not residual or block_norm):
            raise ValueError(f"{name} has no option residual or block_norm; Vim and LBVim have")
        info = model.feature_info
        levels = len(info)
        if not out_indices or any(not 0 <= i < levels for i in out_indices):
            raise ValueError(f"out_indices must name some of the levels 0 to {levels - 1} of {name}, got {out_indices}")
        self.name, self.pretrained = name, pretrained
        self.out_indices = tuple(out_indices)
        self.residual = residual
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        channels = [info[i]["num_chs"] for i in self.out_indices]
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        model.set_grad_checkpointing(with_cp)
        self.model = model
        places = range(len(channels)) if self.isotropic else self.out_indices
        self.places = tuple(places)
        for place, width in zip(self.places, channels, strict=True):
            if out_channels:
                self.add_module(f"out_map{place}", nn.Conv2d(width, out_channels, 1))
            if out_norm:
                self.add_module(f"outnorm{place}", LayerNorm2d(out_channels or width, eps=_EPS))
        self.channels = [out_channels or width for width in channels]
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_chans, H, W) to one map (B, channels, H / stride, W / stride) for each of `out_indices`."""
        options = {} if not self.isotropic else {"residual": self.residual}
        maps = self.model.forward_intermediates(
            x, indices=list(self.out_indices), stop_early=True, intermediates_only=True, **options
        )
        return tuple(self._level(place, level) for place, level in zip(self.places, maps, strict=True))

    def _level(self, place: int, x: Tensor) -> Tensor:
        for kind in ("out_map", "outnorm"):
            layer = getattr(self, f"{kind}{place}", None)
            x = x if layer is None else layer(x)
        return x.contiguous()

    def train(self, mode: bool = True) -> VSSMBackbone:
        """As in nn.Module, but what is frozen stays in evaluation mode, and batch norms do with `norm_eval`."""
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        stem = self.model.patch_embed if self.isotropic else self.model.stem
        for module in (stem, *self._stages()[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)
        if self.isotropic:
            self.model.pos_embed.requires_grad_(False)

    def init_weights(self) -> None:
        """Weights from `init_cfg` or those that timm knows; what the model drew itself otherwise."""
        init = self.init_cfg or {}
        if init.get("type") == "Pretrained":
            self._load_pretrained(state_dict_of(init["checkpoint"]), init.get("prefix", ""), init["checkpoint"])
        elif init:
            raise ValueError(f"init_cfg must be of type 'Pretrained' or None, got {init.get('type')!r}")
        elif self.pretrained:
            source = timm.create_model(self.name, pretrained=True)
            self._load_pretrained(source.state_dict(), "", self.name)
        self._is_init = True

    def _load_pretrained(self, state_dict: Mapping[str, Tensor], prefix: str, source: str) -> None:
        prefix = prefix.removesuffix(".")
        if prefix:
            state_dict = {
                key[len(prefix) + 1 :]: value for key, value in state_dict.items() if key.startswith(prefix + ".")
            }
            if not state_dict:
                raise ValueError(f"{source}: no name begins with {prefix + '.'!r}; check init_cfg's prefix")
        given = self.convert_official(state_dict)
        own = self.state_dict()
        # A classifier's file has no levels; those keep what they begin with.
        missing = {key: own[key] for key in own if _LEVEL_NAMES.match(key) and key not in given}
        load_strictly(self, given | missing)

    def convert_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names of a classifier or of the official dense-prediction wrappers -> ours (ours stay)."""
        levels, rest = {}, {}
        for key, value in state_dict.items():
            match = _LEVEL_NAMES.match(key)
            if match:
                kind, place = match.groups()
                if kind == "out_map" and value.ndim == 2:
                    value = value[:, :, None, None]
                levels[f"{kind}{place}.{key[match.end() :]}"] = value
            else:
                rest[key.removeprefix("model.")] = value
        own = self.model.state_dict()
        converted = self.model.convert_official(rest)
        # The classifier's end, and what follows the last level, are not here.
        kept = {key: value for key, value in converted.items() if key in own or not self._left_out(key)}
        return levels | {f"model.{key}": value for key, value in kept.items()}

    def _left_out(self, key: str) -> bool:
        if _CLASSIFIER.match(key):
            return True
        part, _, rest = key.partition(".")
        number = rest.partition(".")[0]
        return part in ("stages", "blocks") and number.isdigit() and int(number) >= len(self._stages())

    def _stages(self) -> nn.Sequential:
        return self.model.blocks if self.isotropic else self.model.stages
