"""The backbones in OpenMMLab's detection, segmentation and classification packages.

Importing this registers everything in mmengine's root registries, where mmdet, mmseg and mmpretrain find it; in a
configuration: `custom_imports = dict(imports=["vssm.integrations.openmmlab"])`.
"""

from ..openmmlab_packages import require

require("mmengine")

from .backbone import VSSMBackbone  # noqa: E402  what is required comes first
from .building import build_model  # noqa: E402
from .layer_decay import VSSMLayerDecayConstructor  # noqa: E402
from .necks import SimpleFeaturePyramid, VimPyramid  # noqa: E402

__all__ = ["SimpleFeaturePyramid", "VSSMBackbone", "VSSMLayerDecayConstructor", "VimPyramid", "build_model"]
