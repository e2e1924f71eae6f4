"""The backbones in OpenMMLab's detection, segmentation and classification packages.

Importing this registers everything in mmengine's root registries, where mmdet, mmseg and mmpretrain find it; in a
configuration: `custom_imports = dict(imports=["vssm.integrations.openmmlab"])`.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"vssm.integrations.openmmlab needs mmengine ({error}); run `make openmmlab` in a checkout of vssm, or "
        "pip install onedl-mmengine"
    ) from None

from .backbone import VSSMBackbone
from .layer_decay import VSSMLayerDecayConstructor
from .necks import SimpleFeaturePyramid, VimPyramid

__all__ = ["SimpleFeaturePyramid", "VSSMBackbone", "VSSMLayerDecayConstructor", "VimPyramid"]
