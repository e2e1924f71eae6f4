"""Vision and medical-imaging state-space models: scan ops, timm backbones and MONAI segmentation networks."""

from . import models, ops

__all__ = ["models", "ops"]
__version__ = "0.1.0"
