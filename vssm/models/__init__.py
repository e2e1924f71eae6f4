"""timm backbones, one file per paper. Importing this package registers them with timm."""

from .efficientvmamba import EfficientVMamba
from .groupmamba import GroupMamba
from .hrvmamba import HRVMamba
from .lbvim import LBVim
from .msvmamba import MSVMamba, MSVMambaV3
from .vcmamba import VCMamba
from .vim import Vim
from .vmamba import VMamba
from .vssd import VSSD

__all__ = [
    "VSSD",
    "EfficientVMamba",
    "GroupMamba",
    "HRVMamba",
    "LBVim",
    "MSVMamba",
    "MSVMambaV3",
    "VCMamba",
    "VMamba",
    "Vim",
]
