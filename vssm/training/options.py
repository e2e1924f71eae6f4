"""Options: a flat YAML file and KEY=VALUE settings, checked against a dataclass; unknown keys are errors."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import yaml

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, one or lists of them of this shape (None is any length), maybe whole ones only."""

    low: float
    high: float
    shape: tuple[int | None, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Choice:
    """One of these texts."""

    texts: tuple[str, ...]


def read_options(options_class: type[OptionsT], path: Path, settings: Iterable[str]) -> OptionsT:
    """Options from a YAML file and from KEY=VALUE settings, which win.

    A file with the key `base`, the path of another one beside it, adds to that one's options and replaces them.

    Args:
        options_class: dataclass with one field per option, of type str (maybe annotated with a Choice), bool, dict or
            list, or int, float or list annotated with a Range. Fields with a default may be left out.

    Raises:
        ValueError: a key that is unknown or missing, or a value of the wrong kind, shape or size.
    """
    values = _read(path)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: KEY=VALUE is needed")
        values[key] = _parse(text, f"--set {setting}")
    hints = get_type_hints(options_class, include_extras=True)
    needed = {field.name for field in fields(options_class) if _has_no_default(field)}
    for complaint, names in (("unknown", values.keys() - hints), ("missing", needed - values.keys())):
        if names:
            raise ValueError(f"{complaint} option {', '.join(sorted(map(str, names)))}; there are {', '.join(hints)}")
    return options_class(**{name: _checked(name, hints[name], value) for name, value in values.items()})


def check_options(options: Any) -> None:
    """Check the values of a dataclass made in code as `read_options` checks a file's.

    Raises:
        ValueError: a value of the wrong kind, shape or size.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        _checked(name, hint, getattr(options, name))


def _read(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The table of a file over that of the file it names as `base`, if it does."""
    try:
        values = _parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a configuration file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); give a configuration file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a table of options, got {type(values).__name__}; correct it")
    if "base" not in values:
        return values
    base = path.parent / str(values.pop("base"))
    readers = (*readers, path.resolve())
    if base.resolve() in readers:
        raise ValueError(f"{path}: its base {base} is based on it; correct it")
    return _read(base, readers) | values


def _has_no_default(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: is not YAML ({error}); correct it") from None


def _checked(name: str, hint: Any, value: Any) -> Any:
    kind, *limits_given = get_args(hint) or (hint,)
    # YAML reads 1 as an integer and 1e-3 as a text
    if kind is float and type(value) in (int, str):
        with suppress(ValueError):
            value = float(value)
    # YAML reads a no without quotes as false
    if value is False and any(isinstance(limits, Choice) and "no" in limits.texts for limits in limits_given):
        value = "no"
    if type(value) is not kind:
        raise ValueError(f"option {name} must be {kind.__name__}, got {value!r}")
    for limits in limits_given:
        if isinstance(limits, Choice):
            if value not in limits.texts:
                raise ValueError(f"option {name} must be one of {', '.join(limits.texts)}, got {value!r}")
            continue
        sizes = " x ".join("any" if size is None else str(size) for size in limits.shape) or "one"
        kind_of = "whole numbers" if limits.whole else "numbers"
        needed = f"option {name} must hold {kind_of} from {limits.low:g} to {limits.high:g}, {sizes} of them"
        try:
            numbers = np.array(value, dtype=float)
        except (TypeError, ValueError):
            raise ValueError(f"{needed}, got {value!r}") from None
        shape = tuple(got if want is None else want for want, got in zip(limits.shape, numbers.shape, strict=False))
        inside = (limits.low <= numbers) & (numbers <= limits.high) & ((numbers % 1 == 0) | (not limits.whole))
        if len(limits.shape) != numbers.ndim or shape != numbers.shape or not numbers.size or not inside.all():
            raise ValueError(f"{needed}, got {value!r}")
    return value
