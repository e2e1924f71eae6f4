"""Functional ops. Each has a definition (reference), a portable form for every device and kernels for some."""

from .backends import use_portable, use_reference
from .causal_conv1d import causal_conv1d
from .cross_selective_scan import cross_selective_scan
from .flops import fvcore_handles
from .local_bidirectional_scan import local_bidirectional_scan
from .nc_ssd import nc_ssd
from .selective_scan import selective_scan
from .shims import install_shims
from .ssd import ssd

__all__ = [
    "causal_conv1d",
    "cross_selective_scan",
    "fvcore_handles",
    "install_shims",
    "local_bidirectional_scan",
    "nc_ssd",
    "selective_scan",
    "ssd",
    "use_portable",
    "use_reference",
]
