"""The native CPU kernels: finds libvssm_cpu, checks its interface number and declares its C signatures.

`library` is the loaded library, or None; then `reason` says in a sentence why, and what to do.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from pathlib import Path

# Before the library: it then shares the OpenMP runtime, and so the thread pool, that torch brings.
import torch

ABI = 2

_FILE = {"darwin": "libvssm_cpu.dylib", "win32": "libvssm_cpu.dll"}.get(sys.platform, "libvssm_cpu.so")
_REINSTALL = "install a C++17 compiler (GCC 11 or newer, or Clang) and reinstall vssm"

# Codes of VssmDtype in kernels/vssm_cpu.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# VSSM_MAX_STATES in kernels/vssm_cpu.h.
MAX_STATES = 256
# VSSM_MAX_WINDOW in kernels/vssm_cpu.h.
MAX_WINDOW = 16

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
# Name -> (result, pointer and flag arguments in the order of kernels/vssm_cpu.h, number of sizes that follow).
_SIGNATURES = {
    "vssm_abi": (_INT, [], 0),
    "vssm_simd_level": (ctypes.c_char_p, [], 0),
    # dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus, out, last_state, chunk_states
    "vssm_selective_scan_forward": (None, [_INT, *[_POINTER] * 8, _INT, *[_POINTER] * 3], 7),
    "vssm_selective_scan_backward_workspace": (_INT, [], 7),
    # dtype, grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus,
    # du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, workspace
    "vssm_selective_scan_backward": (None, [_INT, *[_POINTER] * 11, _INT, *[_POINTER] * 9], 7),
    # dtype, x, weight, bias, silu, out
    "vssm_causal_conv1d_forward": (None, [_INT, *[_POINTER] * 3, _INT, _POINTER], 5),
    "vssm_causal_conv1d_backward_workspace": (_INT, [], 2),
    # dtype, grad_out, x, weight, bias, silu, dx, dweight, dbias, workspace
    "vssm_causal_conv1d_backward": (None, [_INT, *[_POINTER] * 4, _INT, *[_POINTER] * 4], 5),
    # dtype, x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus, y, chunk_states, workspace
    "vssm_cross_scan_forward": (None, [_INT, *[_POINTER] * 7, _INT, *[_POINTER] * 3], 10),
    "vssm_cross_scan_forward_workspace": (_INT, [_INT], 10),
    # dtype, grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus,
    # dx, ddt_b_c, ddt_weight, dA, dD, ddelta_bias, workspace
    "vssm_cross_scan_backward": (None, [_INT, *[_POINTER] * 9, _INT, *[_POINTER] * 7], 10),
    "vssm_cross_scan_backward_workspace": (_INT, [_INT], 10),
    # dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus, out, chunk_states
    "vssm_local_bidirectional_scan_forward": (None, [_INT, *[_POINTER] * 8, _INT, *[_POINTER] * 2], 8),
    # dtype, grad_out, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus,
    # du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, workspace
    "vssm_local_bidirectional_scan_backward": (None, [_INT, *[_POINTER] * 10, _INT, *[_POINTER] * 9], 8),
    # dtype, x, dt, decay, B, C, D, z, initial_states, out, final_states
    "vssm_ssd_forward": (None, [_INT, *[_POINTER] * 10], 7),
    "vssm_ssd_backward_workspace": (_INT, [], 7),
    # dtype, grad_out, grad_final_states, x, dt, decay, B, C, D, z, initial_states,
    # dx, ddt, dlog_decay, dB, dC, dD, dz, dinitial_states, workspace
    "vssm_ssd_backward": (None, [_INT, *[_POINTER] * 19], 7),
}


def _find() -> tuple[Path | None, str]:
    """Where the library lies, or None and the reason."""
    override = os.environ.get("VSSM_NATIVE_LIB")
    if override:
        if Path(override).is_file():
            return Path(override), ""
        return None, f"VSSM_NATIVE_LIB={override} is not a file; point it to a built {_FILE} or unset it"
    try:
        distribution = importlib.metadata.distribution("vssm")
    except importlib.metadata.PackageNotFoundError:
        return (
            None,
            "vssm is not installed; run `pip install .` (with -e to keep editing), which builds the native kernels",
        )
    # Right in a wheel and in an editable install, where the library does not lie beside this file.
    path = Path(distribution.locate_file(f"vssm/{_FILE}"))
    if path.is_file():
        return path, ""
    return None, f"{path} is missing: vssm was installed without a working C++ compiler; {_REINSTALL}"


def load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """Loads and checks the library at `path`: (library, ""), or (None, why not and what to do)."""
    try:
        found = ctypes.CDLL(str(path))
        found.vssm_abi.restype = _INT
        version = found.vssm_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}); {_REINSTALL}"
    if version != ABI:
        return None, f"{path} has interface {version}, this vssm needs {ABI}; reinstall vssm so that both match"
    for name, (result, arguments, sizes) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, [*arguments, *[_INT] * sizes]
    wanted, level = os.environ.get("VSSM_SIMD"), found.vssm_simd_level().decode()
    if wanted and wanted != level:
        return (
            None,
            f"VSSM_SIMD={wanted} is not an instruction set of this machine and library; unset it or use {level}",
        )
    return found, ""


def address(tensor: torch.Tensor | None) -> int | None:
    """What a pointer argument takes for `tensor`, which must be contiguous and outlive the call."""
    return None if tensor is None else tensor.data_ptr()


def _load() -> tuple[ctypes.CDLL | None, str]:
    path, reason = _find()
    return (None, reason) if path is None else load(path)


library, reason = _load()
