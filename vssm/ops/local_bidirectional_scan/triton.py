"""The locally bi-directional scan on the Triton kernels of the selective scan, given a window.

`op.py` registers it for CUDA and ROCm tensors where Triton is installed.
Letters: B batch, D channels, L steps, N states, G groups of B and C.
"""

from __future__ import annotations

from ..selective_scan import triton as selective_scan
from . import portable
from .chunks import windowed_chunk_length

MAX_WINDOW = 16


def _takes(inputs, window: int) -> bool:
    """The kernels take what the selective scan's do, with windows that are powers of two up to 16, as the official."""
    return selective_scan.takes(*inputs) and window <= MAX_WINDOW and window & (window - 1) == 0


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window):
    """`vssm::local_bidirectional_scan_forward`: out (B, D, L), chunk states (B, D, chunks, N)."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not _takes(inputs, window):
        return portable.local_bidirectional_scan_forward(*inputs, delta_softplus, window)
    chunk = windowed_chunk_length(u.shape[2], window)
    out, _, chunk_states = selective_scan.scan(*inputs, delta_softplus, chunk, window)
    return out, chunk_states


def backward(grad_out, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus, window):
    """`vssm::local_bidirectional_scan_backward`: gradients in the order of the inputs, empty for absent ones."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if not _takes(inputs, window):
        return portable.local_bidirectional_scan_backward(grad_out, *inputs, chunk_states, delta_softplus, window)
    chunk = windowed_chunk_length(u.shape[2], window)
    return selective_scan.scan_gradients(grad_out, None, inputs, chunk_states, delta_softplus, chunk, window)
