"""Functional ops. Each has a definition (reference), a portable form for every device and kernels for some."""

from .backends import use_portable, use_reference
from .causal_conv1d import causal_conv1d
from .cross_selective_scan import cross_selective_scan
from .selective_scan import selective_scan
from .shims import install_shims

__all__ = [
    "causal_conv1d",
    "cross_selective_scan",
    "install_shims",
    "selective_scan",
    "use_portable",
    "use_reference",
]
