"""`vssm info` and `vssm list`: what is installed, which kernel serves which op, which models there are."""

import argparse
import fnmatch
import importlib.metadata
import platform
from collections.abc import Callable

import timm
import torch

import vssm
from vssm import zoo
from vssm.complexity import complexity

from .common import CommandError, add_command, medical, note, print_table


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare `info` and `list`."""
    add_command(commands, _info, "info", "versions, and which kernel serves each op on each device", "vssm info")
    listing = add_command(
        commands, _list, "list", "models and networks with their sizes and published accuracy", "vssm list 'vmamba_*'"
    )
    listing.add_argument("pattern", nargs="?", default="*", help="part of the name, or a pattern with * and ?")


def _info(options: argparse.Namespace) -> None:
    from vssm.ops import backends, native

    versions = {"vssm": vssm.__version__, "python": platform.python_version()}
    for package in ("torch", "timm", "monai", "nibabel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = 'not installed; pip install "vssm[medical]"'
    for name, version in versions.items():
        print(f"{name:<9} {version}")
    if native.library is not None:
        print(f"{'native':<9} {native.library._name}, {native.library.vssm_simd_level().decode()}")
    print_table(
        [("op", "device", "kernel", ""), *((row.op, row.device, row.kernel, row.reason) for row in backends.status())]
    )


def _list(options: argparse.Namespace) -> None:
    pattern = options.pattern if set(options.pattern) & set("*?[") else f"*{options.pattern}*"
    rows = [_model_row(name) for name in filter(_matches(pattern), model_names())]
    try:
        networks = medical("vssm.networks").__all__
    except CommandError as error:
        networks = []
        note(f"networks are not listed: {error}")
    rows += [(name, "by arguments", "", "any", "", "") for name in filter(_matches(pattern), networks)]
    if not rows:
        raise CommandError(f"nothing matches {options.pattern!r}; run vssm list without a pattern to see all")
    print_table([("name", "parameters", "GFLOPs", "input", "published top-1", "licence of weights"), *rows])


def _model_row(name: str) -> tuple[str, ...]:
    row = zoo.measured().get(name)
    if row is None:
        size = timm.get_pretrained_cfg(name).input_size
        # shapes without storage: counting needs no weights
        with torch.device("meta"):
            counted = complexity(timm.create_model(name), size)
    else:
        size, counted = row.input_size, row
    weights = zoo.classifiers(name)
    best = max((facts.top1 for facts in weights if facts.top1), default=None)
    return (
        name,
        f"{counted.parameters / 1e6:.1f} M",
        f"{counted.gflops:.1f}",
        "x".join(map(str, size)),
        "" if best is None else f"{best:.1f}",
        ", ".join(dict.fromkeys(facts.weights_licence for facts in weights)),
    )


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda name: fnmatch.fnmatchcase(name.lower(), pattern.lower())


def model_names() -> list[str]:
    """Every name that vssm registers with timm."""
    return [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vssm.")]
