"""Official weights: safe reading of their files, renaming by a rule table, strict loading.

Nothing in a checkpoint file is executed or imported. Official files are pickles that hold, besides tensors, the
trainer's configuration and logs; those few class names are read as inert containers and every other global is refused.
"""

import os
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Rule = tuple[str, str | None]

# Where trainers put the weights in their files, best first (averaged weights before the last iterate, as timm does).
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "network_weights")
# What torch's and safetensors' readers raise on bytes that are no checkpoint, found by changing bytes of good files.
_DAMAGED = (
    UnpicklingError,
    SafetensorError,
    struct.error,
    zipfile.BadZipFile,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
# What DistributedDataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")


class _Opaque:
    """Stands for an object nobody needs; takes any arguments and state, keeps nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Names met in official pickles -> what is built instead. OrderedDict stands for the attribute containers because
# torch's restricted unpickler fills only exact dictionaries. Numbers and arrays of NumPy come from the trainers' logs;
# OpenMMLab's hold the functions of HistoryBuffer, which pickle writes as calls of getattr: nothing is looked up here.
_STAND_INS = [
    (OrderedDict, "yacs.config.CfgNode"),
    (OrderedDict, "argparse.Namespace"),
    (_Opaque, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Opaque, "builtins.getattr"),
    (_Opaque, "numpy.dtype"),
    (_Opaque, "numpy.ndarray"),
    *(
        (_Opaque, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
]


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the state dict of a `.safetensors` file or of a PyTorch file, on CPU, without executing anything in it.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file is damaged, holds no state dict, or is a pickle that names a global outside the short
            list of harmless ones; the message names the file, the refused global and what to do.
    """
    return read_wrapped(path)[1]


def read_wrapped(path: str | os.PathLike) -> tuple[list[str], dict[str, Tensor]]:
    """As `read_checkpoint`, and the keys that hold weights in the file, the one that was read first; none if bare."""
    path = os.fspath(path)
    try:
        if path.endswith(".safetensors"):
            content = load_file(path)
        else:
            _refuse_inflated(path)
            with torch.serialization.safe_globals(_STAND_INS):
                content = torch.load(path, map_location="cpu", weights_only=True)
        return _wrappers_in(content), unwrap(content)
    except _DAMAGED as error:
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
        if refused is None:
            # torch puts its advice for trusting the file before and after what went wrong.
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0]
            raise ValueError(f"{path} is damaged or not a checkpoint ({type(error).__name__}: {reason})") from error
        raise ValueError(
            f"{path} names the global {refused[1]}, which is not on the list of harmless ones, so it was not read. "
            "If you trust its source, open it once with torch.load(path, weights_only=False), keep only the tensors "
            "(torch.save or safetensors.torch.save_file of the state dict) and load that file."
        ) from error


def _refuse_inflated(path: str) -> None:
    """ValueError for a zip archive that holds more than its own size, as torch.save, which compresses nothing, never
    writes: unpacking it could fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = sum(entry.file_size for entry in archive.infolist())
        if content > os.path.getsize(path):
            raise ValueError(f"a compressed archive, which would grow to {content} bytes")


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """The state dict inside a trainer's checkpoint, without the prefixes of DistributedDataParallel and torch.compile.

    Looks under `state_dict_ema`, `model_ema`, `state_dict`, `model`, `model_state_dict`, `network_weights`, else takes
    `checkpoint` itself.

    Raises:
        ValueError: what is found is not a mapping of names to tensors.
    """
    for key in _wrappers_in(checkpoint)[:1]:
        checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        what = "an empty one" if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"a state dict (names to tensors) is needed, got {what}")
    for key, value in checkpoint.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"a state dict (names to tensors) is needed, got {type(value).__name__} under {key!r}; "
                f"weights are looked for at the top level and under {', '.join(_WRAPPERS)}"
            )
    return _renamed(checkpoint, _without_prefixes)


def _wrappers_in(checkpoint: object) -> list[str]:
    if not isinstance(checkpoint, Mapping):
        return []
    return [key for key in _WRAPPERS if isinstance(checkpoint.get(key), Mapping)]


def remap(state_dict: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Rename the keys of `state_dict` by a table of `(official pattern, ours)`.

    Every rule is a regular expression searched in the name and replaced as in `re.sub`; all rules apply, in order, each
    to what the earlier ones made of the name. A rule with None drops the names it is found in. Other names are kept.

    Raises:
        ValueError: two names become one and their tensors differ (equal tensors are tied parameters and are merged).
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(key: str) -> str | None:
        for pattern, replacement in compiled:
            if replacement is not None:
                key = pattern.sub(replacement, key)
            elif pattern.search(key):
                return None
        return key

    return _renamed(state_dict, rename)


def linear_from_pointwise(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with 1x1 convolution weights (O, I, 1, 1) flattened where `module` has a linear layer (O, I)."""
    own = module.state_dict()

    def is_pointwise(key: str, value: Tensor) -> bool:
        return key in own and own[key].ndim == 2 and value.ndim == 4 and value.shape[2:] == (1, 1)

    return {key: value.flatten(1) if is_pointwise(key, value) else value for key, value in state_dict.items()}


def load_official(module: nn.Module, path_or_state_dict: str | os.PathLike | Mapping) -> None:
    """Load official weights into a vssm model or network, strictly.

    Args:
        module: a model or network with a `convert_official(state_dict)` method, which every one of vssm's has; or a
            detector or segmentor of OpenMMLab whose `backbone` has one (`vssm.integrations.openmmlab`): neck and heads
            have the packages' own names.
        path_or_state_dict: a checkpoint file (see `read_checkpoint`), its content, or a bare state dict. Names in
            vssm's own format are accepted too.

    Raises:
        ValueError: names or shapes that do not match, the first ten listed; a missing `num_batches_tracked` is fine.
    """
    state_dict = state_dict_of(path_or_state_dict)
    if hasattr(module, "convert_official"):
        load_strictly(module, module.convert_official(state_dict))
    elif hasattr(getattr(module, "backbone", None), "convert_official"):
        load_strictly(module, _convert_around_backbone(module, state_dict))
    else:
        raise ValueError(
            f"module must be a vssm model or network, got {type(module).__name__}, which has no convert_official"
        )


def _convert_around_backbone(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with the names under `backbone.` converted; those of layers that our neck has move to `neck.`."""
    in_neck = getattr(getattr(module, "neck", None), "official_backbone_names", None)
    backbone, converted = {}, {}
    for key, value in state_dict.items():
        part, _, rest = key.partition(".")
        if part != "backbone":
            converted[key] = value
        elif in_neck and re.match(in_neck, rest):
            converted[f"neck.{rest}"] = value
        else:
            backbone[rest] = value
    own = module.backbone.convert_official(backbone)
    return converted | {f"backbone.{key}": value for key, value in own.items()}


def state_dict_of(path_or_state_dict: str | os.PathLike | Mapping) -> dict[str, Tensor]:
    """The state dict of a checkpoint file (see `read_checkpoint`) or of its content (see `unwrap`)."""
    if isinstance(path_or_state_dict, (str, os.PathLike)):
        return read_checkpoint(path_or_state_dict)
    return unwrap(path_or_state_dict)


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], adaptable: tuple[str, ...] = ()) -> None:
    """Load a state dict in the names of `module`; ValueError as in `check_match`, before anything is changed."""
    check_match(module, state_dict, adaptable)
    module.load_state_dict(state_dict, strict=False)


def check_match(module: nn.Module, state_dict: Mapping[str, Tensor], adaptable: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless `state_dict` has exactly the names and shapes of `module`.

    Args:
        adaptable: submodules whose tensors may be absent or of another shape (timm adapts the first convolution to
            `in_chans` and leaves out a classifier of another size).
    """
    own = module.state_dict()
    adapted = tuple(f"{name}." for name in adaptable)
    problems = []
    for key, value in state_dict.items():
        if key.startswith(adapted):
            continue
        if key not in own:
            problems.append(f"{key} {tuple(value.shape)} is not in the model")
        elif value.shape != own[key].shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, the model needs {tuple(own[key].shape)}")
    for key, value in own.items():
        if key not in state_dict and not key.endswith("num_batches_tracked") and not key.startswith(adapted):
            problems.append(f"{key} {tuple(value.shape)} is missing from the checkpoint")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            f"the checkpoint does not fit {type(module).__name__}; check the model's name and size. "
            f"Mismatches ({len(problems)}):\n  " + "\n  ".join(problems[:10] + more)
        )


def _without_prefixes(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _renamed(state_dict: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """`state_dict` under new names; None drops. Names that meet must hold equal tensors."""
    out: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state_dict.items():
        name = rename(key)
        if name is None:
            continue
        if name in out and not torch.equal(out[name], value):
            raise ValueError(f"{origin[name]} and {key} both stand for {name}, but their tensors differ")
        out[name], origin[name] = value, key
    return out
