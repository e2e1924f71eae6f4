"""Learning rates that fall from the head to the stem of the backbone, and no decay where the models want none."""

from __future__ import annotations

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.optim import param_groups_layer_decay
from torch import nn

from .backbone import VSSMBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VSSMLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Groups of parameters for `optim_wrapper = dict(constructor="VSSMLayerDecayConstructor", paramwise_cfg=...)`.

    `paramwise_cfg`'s `layer_decay` (default 1: none) is the ratio of the rates of neighbouring layers of the backbone,
    which timm's layer groups of the model define; neck and heads have the full rate, the last layer of the backbone
    `layer_decay` times it, as in mmdetection's constructor. One-dimensional parameters and those that a model exempts
    (`no_weight_decay`: positions, A, D, biases of scans) are not decayed.
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: object) -> None:
        """Fill `params` with groups for the optimizer: the backbone's by layer, then everything else."""
        ratio = self.paramwise_cfg.get("layer_decay", 1.0)
        backbones = [part for part in module.modules() if isinstance(part, VSSMBackbone)]
        taken: set[int] = set()
        for backbone in backbones:
            model = backbone.model
            exempt = model.no_weight_decay()
            groups = param_groups_layer_decay(
                model, self.base_wd or 0.0, no_weight_decay_list=exempt, layer_decay=ratio, min_scale=0.0
            )
            for group in groups:
                scale = group.pop("lr_scale", 1.0) * ratio
                taken |= {id(parameter) for parameter in group["params"]}
                params.append(
                    {"params": group["params"], "lr": self.base_lr * scale, "weight_decay": group["weight_decay"]}
                )
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
        for flat, decay in ((True, 0.0), (False, self.base_wd)):
            chosen = [p for p in rest if (p.ndim <= 1) == flat]
            if chosen:
                group = {"params": chosen, "lr": self.base_lr}
                params.append(group if decay is None else group | {"weight_decay": decay})
