"""Whether Triton kernels can serve CUDA and ROCm tensors, which are both of device type "cuda" in PyTorch.

`reason` says in a sentence why not, and is empty if they can.
"""

from __future__ import annotations

import torch


def _find() -> str:
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); run pip install triton"
    return ""


reason = _find()
