"""The scan along routes as an ONNX graph can hold it: selections by the table around the scan's own ONNX form.

Letters: B batch, P positions, D channels, K routes.
"""

from __future__ import annotations

from ..selective_scan.onnx import selective_scan_onnx
from .portable import Sequences


def cross_selective_scan_onnx(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus):
    """y like x, (B, P, D) or (B, P, K, D)."""
    c = Sequences(x, dt_b_c, dt_weight, A, order, D, delta_bias)
    y, _ = selective_scan_onnx(*c.arguments, delta_softplus)
    return c.unwalk(y.view(c.x.shape), c.separate).to(x.dtype)
