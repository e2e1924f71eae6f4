"""Segmentation networks in MONAI's manner: 2-D and 3-D in one class, logits out. Needs the `medical` extra (MONAI)."""

from .umamba import UMambaBot, UMambaEnc

__all__ = ["UMambaBot", "UMambaEnc"]
