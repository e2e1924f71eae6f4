"""timm backbones, one file per paper. Importing this package registers them with timm."""

from .efficientvmamba import EfficientVMamba
from .msvmamba import MSVMamba, MSVMambaV3
from .vmamba import VMamba

__all__ = ["EfficientVMamba", "MSVMamba", "MSVMambaV3", "VMamba"]
