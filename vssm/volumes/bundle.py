"""Reading a MONAI bundle (https://docs.monai.io/en/stable/mb_specification.html) without running anything it says.

A bundle is a folder from elsewhere. Of its configs/inference.json three sections are used, as plain data:

- `network_def`: `_target_` names a class of `vssm.networks` or `monai.networks.nets`, the rest are its arguments;
- `preprocessing`: a `Compose` of the MONAI dictionary transforms listed here, on the key "image";
- `inferer`: a `SlidingWindowInferer` with its `roi_size`.

An optional `learned_from` in configs/metadata.json, {"field_of_view_mm": [x, y, z], "foreground_ml": v}, says what the
network has seen, so that a volume unlike it can be told.

Expressions (`$`), references (`@`) and macros (`%`) in them are refused. The labels come from configs/metadata.json,
the weights from models/model.safetensors or models/model.pt.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.networks.nets
import monai.transforms
import torch
from monai.data import MetaTensor

import vssm.networks
from vssm import zoo
from vssm.checkpoint import read_checkpoint

from .digests import digest_files
from .errors import VolumeError
from .json_files import read_json_object

DEFAULT_BUNDLE = "brain_tissue_demo"
_NETWORKS = {"vssm.networks": vssm.networks, "monai.networks.nets": monai.networks.nets}
_WEIGHTS = ("model.safetensors", "model.pt")
# reading, channel order and tensor type are settled before the transforms run
_DONE_BY_READER = ("LoadImaged", "EnsureChannelFirstd", "EnsureTyped")
_TRANSFORMS = (
    "Orientationd", "Spacingd", "NormalizeIntensityd", "ScaleIntensityd", "ScaleIntensityRanged",
    "ScaleIntensityRangePercentilesd", "ThresholdIntensityd", "ShiftIntensityd", "ClipIntensityPercentilesd",
)  # fmt: skip
_WINDOW_OPTIONS = ("roi_size", "sw_batch_size", "overlap", "mode", "sigma_scale", "padding_mode", "cval")


@dataclass(frozen=True)
class Bundle:
    """A network with all that is needed to apply it to a volume.

    Attributes:
        name: the bundle's folder name.
        network: in evaluation mode, on the CPU; (B, in_channels, x, y, z) float32 to logits (B, labels, x, y, z).
        preprocessing: dictionary transforms, applied in order to {"image": MetaTensor (in_channels, X, Y, Z)}.
        window: arguments of `monai.inferers.SlidingWindowInferer`, `roi_size` in voxels among them.
        labels: name of each output channel; channel 0 is the background.
        field_of_view_mm: extent in mm of what it learned from along the network's axes, or None if not recorded.
        foreground_ml: `vssm.volumes.foreground_ml` of what it learned from, or None if not recorded.
        in_channels: how many images of a subject the network takes at once.
        digest: SHA-256 of the configuration and the weights in hexadecimal, empty if it was not read from files.
    """

    name: str
    network: torch.nn.Module
    preprocessing: tuple[Callable[..., Any], ...]
    window: dict[str, Any]
    labels: tuple[str, ...]
    field_of_view_mm: tuple[float, float, float] | None = None
    foreground_ml: float | None = None
    in_channels: int = 1
    digest: str = ""


def default_bundle_path() -> Path:
    """Folder of the bundle that ships with vssm.

    Raises:
        VolumeError: if this installation lacks it.
    """
    return find_bundle(DEFAULT_BUNDLE)


def find_bundle(name_or_path: str | Path) -> Path:
    """Folder of a bundle given by its path or, for those that ship with vssm, by its name.

    Raises:
        VolumeError: if there is none.
    """
    candidates = [Path(name_or_path), *(shipped / name_or_path for shipped in zoo.FOLDERS)]
    try:
        for folder in candidates:
            if (folder / "configs").is_dir():
                return folder
        exists = candidates[0].exists()
    except OSError as error:
        raise VolumeError(f"{name_or_path}: cannot be looked for ({error.strerror}); check the name") from None
    if exists:
        raise VolumeError(f"{name_or_path}: is not a MONAI bundle (no configs folder); give the bundle's folder")
    shipped = sorted({path.parent.name for folder in zoo.FOLDERS for path in folder.glob("*/configs")})
    raise VolumeError(
        f"{name_or_path}: no such bundle; give a bundle's folder or the name of one that ships with vssm "
        f"({', '.join(shipped) or 'this installation has none: reinstall vssm'})"
    )


def load_bundle(path: str | Path) -> Bundle:
    """Build the network of a bundle with its weights, and read how volumes are to be prepared for it.

    Args:
        path: the bundle's folder, for example from `find_bundle`.

    Raises:
        VolumeError: a file or an entry is missing, wrong, not supported, or would run code.
    """
    path = Path(path)
    source, described = (path / "configs" / name for name in ("inference.json", "metadata.json"))
    inference, metadata = (read_json_object(file, "a MONAI bundle needs it") for file in (source, described))
    sections = {name: _entry(source, inference, name) for name in ("network_def", "preprocessing", "inferer")}
    for name, section in sections.items():
        _refuse_expressions(source, name, section)
    network = _network(source, sections["network_def"])
    weights = _load_weights(path / "models", network)
    channels = _in_channels(described, metadata, sections["network_def"])
    return Bundle(
        name=path.resolve().name,
        network=network.eval(),
        preprocessing=_preprocessing(source, sections["preprocessing"], channels),
        window=_window(source, sections["inferer"]),
        labels=_labels(described, metadata),
        in_channels=channels,
        digest=digest_files((source, described, weights)),
        **(_learned_from(described, metadata["learned_from"]) if "learned_from" in metadata else {}),
    )


def _in_channels(source: Path, metadata: dict[str, Any], network: dict[str, Any]) -> int:
    """What the metadata says of the image, else the network's argument, else one."""
    try:
        count = _entry(source, metadata, "network_data_format", "inputs", "image", "num_channels")
    # optional in the bundle format
    except VolumeError:
        count = network.get("in_channels", 1)
    if not _is_positive([count], 1, int) or network.get("in_channels", count) != count:
        raise VolumeError(
            f"{source}: the image has {count} channels, the network takes {network.get('in_channels')}; correct one"
        )
    return count


def _labels(source: Path, metadata: dict[str, Any]) -> tuple[str, ...]:
    channels = _entry(source, metadata, "network_data_format", "outputs", "pred", "channel_def")
    names = [channels.get(str(index)) for index in range(len(channels))] if isinstance(channels, dict) else []
    # label maps are written as bytes
    if not 2 <= len(names) <= 256 or not all(isinstance(name, str) for name in names):
        raise VolumeError(
            f"{source}: channel_def must name 2 to 256 outputs as {{'0': 'background', '1': ...}}, got {channels}; "
            "networks with one sigmoid output are not supported"
        )
    return tuple(names)


def _learned_from(source: Path, section: Any) -> dict[str, Any]:
    extent, foreground = (_entry(source, section, name) for name in ("field_of_view_mm", "foreground_ml"))
    if not _is_positive(extent, 3, (int, float)) or not _is_positive([foreground], 1, (int, float)):
        raise VolumeError(
            f"{source}: learned_from must hold field_of_view_mm, three positive numbers, and foreground_ml, one, "
            f"got {section}; correct it or leave out learned_from"
        )
    return {"field_of_view_mm": tuple(extent), "foreground_ml": foreground}


def _is_positive(values: Any, count: int, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(v, kind) and v > 0 for v in values)


def _entry(source: Path, config: dict[str, Any], *names: str) -> Any:
    for name in names:
        if not isinstance(config, dict) or name not in config:
            raise VolumeError(f"{source}: lacks {'.'.join(names)}; add it as the MONAI bundle format describes")
        config = config[name]
    return config


def _refuse_expressions(source: Path, name: str, section: Any) -> None:
    if isinstance(section, str) and section.startswith(("$", "@", "%")):
        raise VolumeError(f"{source}: {name} holds {section!r}; vssm does not evaluate bundles, write the value itself")
    parts = section.values() if isinstance(section, dict) else section if isinstance(section, list) else ()
    for part in parts:
        _refuse_expressions(source, name, part)


def _target_and_arguments(
    source: Path, name: str, section: Any, nested: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Split a component into its target and its arguments; only the argument `nested` may hold components."""
    if not isinstance(section, dict) or not isinstance(section.get("_target_"), str):
        raise VolumeError(f"{source}: {name} must be an object with a _target_, got {section!r}; correct it")
    arguments = {key: value for key, value in section.items() if key != "_target_"}
    plain = {key: value for key, value in arguments.items() if key != nested}
    # components inside arguments, and MONAI's own switches such as _mode_ and _disabled_
    if any(key.startswith("_") for key in plain) or '"_target_"' in json.dumps(plain):
        raise VolumeError(f"{source}: {name} may hold one _target_ and plain arguments, got {section}; simplify it")
    return section["_target_"], arguments


def _network(source: Path, section: Any) -> torch.nn.Module:
    target, arguments = _target_and_arguments(source, "network_def", section)
    package, _, name = target.rpartition(".")
    # MONAI's own bundles name its networks without the package
    found = getattr(_NETWORKS.get(package or "monai.networks.nets"), name, None)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise VolumeError(f"{source}: network_def names {target!r}; give a class of {' or '.join(_NETWORKS)}")
    try:
        return found(**arguments)
    # what constructors raise for arguments that are unknown or do not fit
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise VolumeError(f"{source}: network_def does not fit {target} ({error}); correct its arguments") from None


def _load_weights(folder: Path, network: torch.nn.Module) -> Path:
    """Load the weights and return their file."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise VolumeError(f"{folder}: holds neither {' nor '.join(_WEIGHTS)}; put the weights there")
    try:
        network.load_state_dict(read_checkpoint(path))
    # RuntimeError: weights of another network
    except (OSError, ValueError, RuntimeError) as error:
        raise VolumeError(f"{path}: does not fit the bundle's network ({error}); get the file again") from None
    return path


def _preprocessing(source: Path, section: Any, channels: int) -> tuple[Callable[..., Any], ...]:
    target, arguments = _target_and_arguments(source, "preprocessing", section, nested="transforms")
    steps = arguments.get("transforms")
    if target.removeprefix("monai.transforms.") != "Compose" or not isinstance(steps, list):
        raise VolumeError(f"{source}: preprocessing must be a Compose with a list of transforms, got {target!r}")
    built = []
    for step in steps:
        target, arguments = _target_and_arguments(source, "preprocessing", step)
        name = target.removeprefix("monai.transforms.")
        if name in _DONE_BY_READER:
            continue
        if name not in _TRANSFORMS or arguments.get("keys") not in ("image", ["image"]):
            raise VolumeError(
                f"{source}: preprocessing asks for {step}; supported on the key 'image' are {', '.join(_TRANSFORMS)}"
            )
        if name == "Orientationd":
            # MONAI's own choice, which it otherwise announces with a warning
            arguments.setdefault("labels", None)
        try:
            built.append(getattr(monai.transforms, name)(**arguments))
        except (TypeError, ValueError) as error:
            raise VolumeError(f"{source}: preprocessing cannot build {step} ({error}); correct it") from None
    _try(source, built, channels)
    return tuple(built)


def _try(source: Path, steps: list[Callable[..., Any]], channels: int) -> None:
    """Run the transforms on eight voxels: some look at their arguments only then."""
    voxels = torch.arange(8.0 * channels).reshape(channels, 2, 2, 2)
    data = {"image": MetaTensor(voxels, affine=torch.eye(4))}
    for step in steps:
        try:
            data = step(data)
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            name = type(step).__name__
            raise VolumeError(f"{source}: preprocessing step {name} does not work ({error}); correct it") from None


def _window(source: Path, section: Any) -> dict[str, Any]:
    target, arguments = _target_and_arguments(source, "inferer", section)
    size = arguments.get("roi_size")
    if target.removeprefix("monai.inferers.") != "SlidingWindowInferer" or not _is_positive(size, 3, int):
        raise VolumeError(
            f"{source}: inferer must be a SlidingWindowInferer with three positive roi_size, got {target} {size}"
        )
    unknown = sorted(arguments.keys() - _WINDOW_OPTIONS)
    if unknown:
        raise VolumeError(f"{source}: inferer sets {', '.join(unknown)}; {', '.join(_WINDOW_OPTIONS)} can be set")
    return {"mode": "gaussian"} | arguments
