"""Whole detectors and segmentors from configurations."""

from __future__ import annotations

from mmengine import Config
from mmengine.model import revert_sync_batchnorm
from torch import nn

from ..openmmlab_packages import require


def build_model(config: Config) -> nn.Module:
    """The model of a configuration of mmdet or mmseg, with batch norms that work in one process on a CPU.

    Raises:
        ImportError: the package is missing or does not fit.
    """
    package = "mmdet" if config.default_scope == "mmdet" else "mmseg"
    require("mmcv.ops", package)
    if package == "mmdet":
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules
    else:
        from mmseg.registry import MODELS
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=True)
    return revert_sync_batchnorm(MODELS.build(config.model))
