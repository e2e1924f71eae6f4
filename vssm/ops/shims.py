"""Import names of other packages, backed by vssm, so that published repositories run without their CUDA extensions.

Nothing happens on import: `install_shims()` is called by hand, before the repository's own modules are imported.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .causal_conv1d import causal_conv1d
from .selective_scan import op as scan_op
from .selective_scan import selective_scan
from .ssd import ssd

_ORIGIN = "vssm.ops.shims"


def install_shims() -> list[str]:
    """Makes `import mamba_ssm`, `causal_conv1d` and `selective_scan_cuda*` find functions of vssm, on any device.

    Provided are, with the signatures of mamba-ssm 2.3, causal-conv1d 1.6 and VMamba's kernels:
    `mamba_ssm.Mamba` (also in `.modules.mamba_simple`), `mamba_ssm.ops.selective_scan_interface` with
    `selective_scan_fn`, `selective_scan_ref` and `mamba_inner_fn`, `mamba_ssm.ops.triton.ssd_combined` with
    `mamba_chunk_scan_combined`, `causal_conv1d.causal_conv1d_fn`, and `fwd` and `bwd` of `selective_scan_cuda`,
    `selective_scan_cuda_core` and `selective_scan_cuda_oflex`. A second call changes nothing.

    Returns:
        The names that can be imported.

    Raises:
        ImportError: one of the packages is installed; nothing is changed then.
    """
    contents = _contents()
    for name in contents:
        if "." not in name and not _is_ours(name) and (name in sys.modules or importlib.util.find_spec(name)):
            raise ImportError(
                f"install_shims: the package {name} is installed and would be hidden; use it, or uninstall it first"
            )
    for name, attributes in contents.items():
        if not _is_ours(name):
            sys.modules[name] = _module(name, attributes)
    for name in contents:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    return list(contents)


def _contents() -> dict[str, dict[str, Any]]:
    """Module name -> what it holds; a parent comes before its children."""
    interface = {
        "selective_scan_fn": selective_scan,
        "selective_scan_ref": selective_scan,
        "mamba_inner_fn": _mamba_inner,
        "mamba_inner_ref": _mamba_inner,
    }
    functions = {name: interface[name] for name in ("selective_scan_fn", "mamba_inner_fn")}
    return {
        "mamba_ssm": functions | {"Mamba": _mamba_class},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": interface,
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.mamba_simple": {"Mamba": _mamba_class},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": _mamba_chunk_scan},
        "causal_conv1d": {"causal_conv1d_fn": _causal_conv1d, "causal_conv1d_ref": _causal_conv1d},
        "selective_scan_cuda": {"fwd": _forward_gated, "bwd": _backward_gated},
        "selective_scan_cuda_core": {"fwd": _forward, "bwd": _backward},
        "selective_scan_cuda_oflex": {"fwd": _forward_oflex, "bwd": _backward},
    }


def _is_ours(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "origin", None) == _ORIGIN


def _module(name: str, attributes: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, f"Stands in for {name}; see vssm.ops.install_shims.")
    module.__spec__ = ModuleSpec(name, loader=None, origin=_ORIGIN, is_package=True)
    module.__path__ = []
    lazy = {key: value for key, value in attributes.items() if value is _mamba_class}
    for key, value in attributes.items():
        if key not in lazy:
            setattr(module, key, value)

    def find(key: str) -> Any:
        if key in lazy:
            return lazy[key]()
        raise AttributeError(f"vssm's stand-in for {name} has no {key!r}")

    module.__getattr__ = find
    return module


def _mamba_class() -> type:
    # Layers are built on ops, not the other way round: found when a repository asks for the class.
    from ..layers.mamba import Mamba

    return Mamba


def _no(function: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{function}: vssm's stand-in has no {name}; leave it out")


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    _no("causal_conv1d_fn", seq_idx=seq_idx, initial_states=initial_states, return_final_states=return_final_states)
    _no("causal_conv1d_fn", final_states_out=final_states_out)
    return causal_conv1d(x, weight, bias, activation)


def _mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    _no("mamba_chunk_scan_combined", seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    options = {"dt_softplus": dt_softplus, "initial_states": initial_states, "dt_limit": dt_limit}
    return ssd(x, dt, A, B, C, chunk_size, D, z, dt_bias, return_final_states=return_final_states, **options)


def _mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """The Mamba mixer between its two projections: [u; z] (B, 2D, L) -> (B, L, C)."""
    u, z = xz.chunk(2, dim=1)
    u = causal_conv1d(u, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    sizes = [rank, *(states for given in (B, C) if given is None)]
    delta, *projected = (x_proj_weight @ u).split(sizes, dim=1)
    if B is None:
        B = projected.pop(0)
        B = B if B_proj_bias is None else B + B_proj_bias[:, None]
    if C is None:
        C = projected.pop(0)
        C = C if C_proj_bias is None else C + C_proj_bias[:, None]
    y = selective_scan(u, delta_proj_weight @ delta, A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y.transpose(1, 2), out_proj_weight.to(y.dtype), out_proj_bias)


def _grouped(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 3 else x


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, rows=1):
    """(out, x): x (B, D, S + 1, 2N) holds at odd places the states before each chunk, and last the final state."""
    inputs = _contiguous(u, delta, A, _grouped(B), _grouped(C), D, None, delta_bias)
    out, last_state, chunk_states = scan_op.forward_op(*inputs, delta_softplus)
    states = torch.cat([chunk_states, last_state[:, :, None]], dim=2)
    return out, torch.stack([torch.zeros_like(states), states], dim=-1).flatten(3)


def _forward_oflex(u, delta, A, B, C, D, delta_bias, delta_softplus, rows=1, out_float=True):
    out, x = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return (out.float() if out_float else out), x


def _backward(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, rows=1):
    return _gradients(u, delta, A, B, C, D, None, delta_bias, dout, x, delta_softplus)[:7]


def _forward_gated(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    out, x = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return (out, x) if z is None else (out, x, out * silu(z))


def _backward_gated(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    *gradients, gate = _gradients(u, delta, A, B, C, D, z, delta_bias, dout, x, delta_softplus)
    if z is None:
        return tuple(gradients)
    # A caller may hand in the place for dz, a part of a larger tensor.
    gate = gate if dz is None else dz.copy_(gate)
    return (*gradients, gate, out * silu(z)) if recompute_out_z else (*gradients, gate)


def _gradients(u, delta, A, B, C, D, z, delta_bias, dout, x, delta_softplus):
    """du, ddelta, dA, dB, dC, dD, ddelta_bias, dz; None for absent inputs."""
    inputs = _contiguous(u, delta, A, _grouped(B), _grouped(C), D, z, delta_bias)
    chunk_states = x[:, :, :-1, 1::2].contiguous()
    du, ddelta, dA, dB, dC, dD, dz, dbias = scan_op.backward_op(
        dout.to(u.dtype).contiguous(), None, *inputs, chunk_states, delta_softplus
    )
    optional = [None if value is None else grad for value, grad in ((D, dD), (delta_bias, dbias), (z, dz))]
    return du, ddelta, dA, dB.view_as(B), dC.view_as(C), *optional
