"""Every registered family at a size that tests can afford; the contract tests read all they need to know from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import timm
import torch

import vssm.models  # noqa: F401


@dataclass(frozen=True)
class Family:
    """A family of registered names.

    Args:
        small: constructor arguments that make a model of few, narrow layers.
        dims: channels of the levels of that model; a single number for a model that keeps its resolution.
        rates: stochastic depth of its blocks, in order, for drop_path_rate=0.4.
        compiled: constructor arguments of a still smaller one, for compilation.
        exempt: last parts of the names of the parameters that are exempt from weight decay though not
            one-dimensional or a bias by name.
        refine: (model, pooled features) -> what its classifier gets.
        features: channels of `forward_features`, where they are not those of the last level.
        parallel: the levels are branches that end together, rather than stages that follow each other.
    """

    small: dict
    dims: tuple[int, ...]
    rates: tuple[float, ...]
    compiled: dict
    exempt: tuple[str, ...] = field(default=())
    refine: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = lambda model, pooled: pooled
    features: int | None = None
    parallel: bool = False


_FOUR = (16, 24, 32, 48)
_VMAMBA = Family(
    small={"depths": (1, 1, 2, 1), "dims": _FOUR},
    dims=_FOUR,
    rates=(0.0, 0.1, 0.2, 0.3, 0.4),
    compiled={"depths": (1, 1), "dims": (8, 16)},
    exempt=("A_logs", "Ds", "dt_projs_bias"),
)
_VIM = Family(
    small={"embed_dim": 16, "depth": 5},
    dims=(16,),
    rates=(0.0, 0.1, 0.2, 0.3, 0.4),
    compiled={"embed_dim": 8, "depth": 2},
    exempt=("pos_embed", "cls_token", "A_logs", "Ds", "dt_projs_bias"),
)
_LBVIM = Family(
    # Six heads pool the tokens of one of them.
    small={"embed_dim": 24, "depth": 5},
    dims=(24,),
    rates=(0.0, 0.1, 0.2, 0.3, 0.4),
    compiled={"embed_dim": 12, "depth": 2},
    exempt=("pos_embed", "A_log", "D"),
)

_EFFICIENTVMAMBA = replace(_VMAMBA, compiled={"depths": (1, 1, 1), "dims": (8, 16, 24)})

_GROUPMAMBA = Family(
    small={"depths": (1, 1, 2, 1), "dims": _FOUR, "stem_dim": 8, "mlp_ratios": (2.0, 2.0, 2.0, 2.0)},
    dims=_FOUR,
    rates=(0.0, 0.1, 0.2, 0.3, 0.4),
    compiled={"depths": (1, 1), "dims": (8, 16), "stem_dim": 4, "mlp_ratios": (2.0, 2.0)},
    # Scan parameters decay as in the official training.
    exempt=(),
    refine=lambda model, pooled: model.class_block(pooled),
)
_VSSD = Family(
    small={"depths": (1, 1, 2, 1), "dims": _FOUR, "num_heads": (2, 2, 4, 4), "d_state": 8},
    dims=_FOUR,
    rates=(0.0, 0.1, 0.2, 0.3, 0.4),
    compiled={"depths": (1, 1), "dims": (8, 16), "num_heads": (2, 2)},
)

_HRVMAMBA = Family(
    small={
        "dims": _FOUR,
        "units": (1, 1, 1),
        "depths": (1, 1, 1),
        "stem_dim": 8,
        "bottleneck_dim": 16,
        "neck_dims": _FOUR,
        "num_features": 40,
    },
    dims=_FOUR,
    rates=(0.0, 0.2, 0.4),
    compiled={"dims": (8, 16), "units": (1,), "depths": (1,), "neck_dims": (8, 16)},
    exempt=("A_logs", "Ds", "dt_projs_bias"),
    features=40,
    parallel=True,
)

_VCMAMBA = Family(
    small={"depths": (1, 1, 1, 2), "dims": _FOUR, "mambas": 1},
    dims=_FOUR,
    rates=(0.0, 0.1, 0.2, 0.3, 0.4),
    compiled={"depths": (1, 2), "dims": (8, 16)},
    exempt=("A_log",),
)

# By the part of the registered name before the size.
FAMILIES = {
    "efficientvmamba": _EFFICIENTVMAMBA,
    "groupmamba": _GROUPMAMBA,
    "msvmamba": _VMAMBA,
    "msvmambav3": _VMAMBA,
    "lbvim": _LBVIM,
    "vim": _VIM,
    "hrvmamba": _HRVMAMBA,
    "vcmamba": _VCMAMBA,
    "vmamba": _VMAMBA,
    "vmambav0": _VMAMBA,
    "vssd": _VSSD,
}

# One name for each set of parts: compilation takes seconds.
COMPILED = (
    "vmamba_tiny",
    "vmambav0_tiny",
    "efficientvmamba_tiny",
    "groupmamba_tiny",
    "msvmamba_nano",
    "msvmambav3_tiny",
    "vssd_micro",
    "vim_tiny",
    "lbvim_tiny",
    "lbvim_528",
    "vcmamba_small",
    "hrvmamba_nano",
    "hrvmamba_base",
)

NAMES = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vssm.")]


def family(name: str) -> Family:
    """The family of a registered name such as "vmamba_tiny"."""
    return FAMILIES[name.split("_")[0]]


PYRAMIDS = [name for name in NAMES if len(family(name).dims) > 1]
ISOTROPIC = [name for name in NAMES if len(family(name).dims) == 1]
SEQUENCES = [name for name in PYRAMIDS if not family(name).parallel]


def num_features(name: str) -> int:
    """Channels of the final map of the small model of that name."""
    return family(name).features or family(name).dims[-1]


def create(name: str, seed: int = 0, **kwargs: object) -> torch.nn.Module:
    """The small model of that name, without stochastic depth, in evaluation mode; `kwargs` as for timm."""
    torch.manual_seed(seed)
    return timm.create_model(name, **{"drop_path_rate": 0.0, **family(name).small, **kwargs}).eval()


def create_tiny(name: str) -> torch.nn.Module:
    """A model of fewer layers yet, with three classes."""
    return create(name, num_classes=3, **family(name).compiled)


def classifiers(model: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """The final layers of a model: one, or two whose mean is the output."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def images(*shape: int) -> torch.Tensor:
    """The same standard normal images at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
