"""Segmentation networks in MONAI's manner, logits out; 2-D and 3-D in one class. Needs the `medical` extra (MONAI)."""

from .mhsvmunet import MHSVMUNet
from .msvmunet import MSVMUNet
from .segmamba import SegMamba
from .umamba import UMambaBot, UMambaEnc
from .vivim import Vivim
from .vmunet import VMUNet

__all__ = ["MHSVMUNet", "MSVMUNet", "SegMamba", "UMambaBot", "UMambaEnc", "VMUNet", "Vivim"]
