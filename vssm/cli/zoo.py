"""`vssm zoo`: the published weights, what is known of them, their files."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import nn
from tqdm import tqdm

from vssm import weights, zoo

from .common import CommandError, add_command, note, positive, print_table, usable_device

_FOLDER = "folder of kept files (default: torch's cache of downloads; TORCH_HOME moves it)"
_FILE = "use this file instead of the kept or downloaded one"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare `zoo` and its own commands."""
    parser = commands.add_parser(
        "zoo",
        help="published weights: list, show, get, add, convert, verify",
        description="Published weights: what is known of them, and their files, kept with their SHA-256 of first use.",
        epilog="example: vssm zoo get vmamba_tiny.s1l8_in1k",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    listing = add_command(
        actions, _list, "list", "all published weights", "vssm zoo list 'upernet_*' --task segmentation"
    )
    listing.add_argument("pattern", nargs="?", default="*", help="part of the name, or a pattern with * and ?")
    listing.add_argument("--task", choices=zoo.TASKS, help="only these")
    _folder(listing)

    show = add_command(
        actions, _show, "show", "everything that is known of some weights", "vssm zoo show vssd_tiny.in1k"
    )
    _name(show)
    _folder(show)

    get = add_command(
        actions,
        _get,
        "get",
        "download weights, or say how to get them by hand",
        "vssm zoo get vmamba_tiny.s1l8_in1k",
        "A download that breaks off is continued by the next call. The first file of a name fixes its SHA-256.",
    )
    get.add_argument("names", nargs="+", metavar="NAME", help="rows of vssm zoo list")
    _folder(get)

    add = add_command(
        actions,
        _add,
        "add",
        "keep a file that was downloaded by hand",
        "vssm zoo add groupmamba_tiny.in1k ~/Downloads/groupmamba_tiny_ema.pth",
        "It is read and compared with the model first; then timm.create_model(NAME, pretrained=True) finds it.",
    )
    _name(add)
    add.add_argument("file", type=Path, metavar="FILE", help="the official file, under any name")
    _folder(add)

    convert = add_command(
        actions,
        _convert,
        "convert",
        "write weights as safetensors in vssm's names, with source, terms and hash of the original",
        "vssm zoo convert vmamba_tiny.s1l8_in1k -o vmamba_tiny.safetensors",
    )
    _name(convert)
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="replaced if it exists")
    convert.add_argument("--file", type=Path, metavar="FILE", help=_FILE)
    _folder(convert)

    verify = add_command(
        actions,
        _verify,
        "verify",
        "read and load weights, check every name, run the parity input, evaluate on ImageNet",
        "vssm zoo verify vmamba_tiny.s1l8_in1k --imagenet-val imagenet/val",
        "Prints the hash of the file, the tensors that match, and the model's outputs for a fixed input.",
    )
    _name(verify)
    verify.add_argument("--file", type=Path, metavar="FILE", help=_FILE)
    verify.add_argument("--imagenet-val", type=Path, metavar="FOLDER", help="validation set in folders n01440764, ...")
    verify.add_argument("--batch-size", type=positive, default=64, help="pictures at once (default: %(default)s)")
    verify.add_argument("--workers", type=int, default=4, help="processes that read pictures (default: %(default)s)")
    verify.add_argument("--device", type=usable_device, default="cpu", help="to evaluate on (default: %(default)s)")
    verify.add_argument("--results", type=Path, metavar="CSV", help="also record the evaluation as a row of this file")
    _folder(verify)


def _name(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="a row of vssm zoo list")


def _folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("--folder", type=Path, metavar="FOLDER", help=_FOLDER)


def _list(options: argparse.Namespace) -> None:
    pattern = options.pattern if set(options.pattern) & set("*?[") else f"*{options.pattern}*"
    rows = [facts for name, facts in zoo.published(options.task).items() if fnmatch.fnmatchcase(name, pattern.lower())]
    if not rows:
        raise CommandError(f"no weights match {options.pattern!r}; run vssm zoo list without a pattern to see all")
    kept = _kept(options.folder)
    head = ("weights", "task", "published", "licence of weights", "file")
    print_table([head, *(_row(facts, kept) for facts in rows)])


def _row(facts: zoo.Weights, kept: dict[str, Path]) -> tuple[str, ...]:
    metrics = list(facts.metrics.items())[:1]
    figures = "".join(f"{value:.{zoo.METRICS[key][1]}f} ({zoo.METRICS[key][0]})" for key, value in metrics)
    place = "kept" if facts.name in kept else "download" if facts.url else "by hand"
    return facts.name, facts.task, figures, facts.weights_licence, place


def _show(options: argparse.Namespace) -> None:
    facts = _facts(options.name)
    path = _kept(options.folder).get(facts.name)
    rows = {
        "weights": facts.name,
        "task": facts.task,
        "model": facts.model_name,
        "arguments": ", ".join(f"{key}={value}" for key, value in facts.arguments.items()),
        "published": facts.figures,
        "parameters": facts.parameters,
        "GFLOPs": "" if facts.gflops is None else f"{facts.gflops:g}",
        "download": facts.url or "none",
        "page": facts.page,
        "file": facts.file_name or "its name is not stated",
        "weights under": facts.wrapper,
        "SHA-256": facts.sha256 or "not published",
        "bytes": "not published" if facts.bytes is None else str(facts.bytes),
        "weights' licence": facts.weights_licence,
        "code's licence": facts.code_licence,
        "code": f"{facts.repository} at {facts.commit}",
        "paper": facts.paper,
        "configuration": facts.config,
        "authors' configuration": facts.official_config,
        "remark": "; ".join(filter(None, (facts.note, facts.gflops_note))),
        "kept as": "" if path is None else str(path),
    }
    for name, value in rows.items():
        if value:
            print(f"{name:<22} {value}")
    if not facts.url and path is None:
        note(weights.by_hand(facts))


def _get(options: argparse.Namespace) -> None:
    # all names are looked up before the first download
    for facts in [_facts(name) for name in options.names]:
        with _explained(facts):
            kept = weights.get(facts, options.folder)
        print(f"{facts.name}  {kept.path}  sha256 {kept.sha256}")
        note(f"licence of these weights: {facts.weights_licence}")


def _add(options: argparse.Namespace) -> None:
    from vssm.checkpoint import read_checkpoint
    from vssm.weights.models import meta_model, own_names

    facts = _facts(options.name)
    with _explained(facts):
        own_names(facts, meta_model(facts), read_checkpoint(options.file))
        kept = weights.add(facts, options.file, options.folder)
    print(f"{facts.name}  {kept.path}  sha256 {kept.sha256}")


def _convert(options: argparse.Namespace) -> None:
    from vssm.weights.converting import convert

    facts = _facts(options.name)
    with _explained(facts):
        metadata = convert(facts, _file(facts, options), options.output)
    for key, value in metadata.items():
        print(f"{key:<16} {value}")
    print(f"wrote {options.output}")


def _verify(options: argparse.Namespace) -> None:
    from vssm.hashing import file_sha256
    from vssm.weights.verifying import numbers_of, verify

    facts = _facts(options.name)
    if options.imagenet_val and facts.task != "classification":
        raise CommandError(f"--imagenet-val rates classifiers, {facts.name} is for {facts.task}")
    with _explained(facts):
        path = _file(facts, options)
        found = verify(facts, path)
        digest = file_sha256(path)
    others = f", which also holds {', '.join(found.wrappers[1:])}" if found.wrappers[1:] else ""
    rest = ""
    if found.whole:
        rest = f"; all {found.whole} of the whole model fit {facts.config}"
    elif found.others:
        rest = f"; {found.others} of neck and heads were not looked at, which needs make openmmlab in a checkout"
    print(f"file        {path}, {path.stat().st_size} bytes")
    print(f"SHA-256     {digest}")
    print(f"read from   {found.wrappers[0] if found.wrappers else 'top level'}{others}; published: {facts.wrapper}")
    print(f"names       all {found.matched} tensors fit {facts.model_name}{rest}")
    for name, output in found.outputs.items():
        print(f"{name:<11} {numbers_of(output)}")
    if options.imagenet_val:
        with _explained(facts):
            _rate(options, facts, found.model, digest)


def _rate(options: argparse.Namespace, facts: zoo.Weights, model: nn.Module, digest: str) -> None:
    from timm.data import resolve_data_config

    from vssm.classification.rating import rate
    from vssm.classification.results import as_line, record

    config = resolve_data_config({}, model=model)
    result = rate(
        model.to(options.device),
        "imagenet-val",
        options.imagenet_val,
        config["input_size"][-1],
        config,
        weights=facts.name,
        sha256=digest,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=partial(tqdm, desc="imagenet-val", unit="batch", disable=None),
    )
    print(as_line(result))
    if facts.top1 is not None:
        print(f"published   top-1 {facts.top1:.1f} %, a difference of {result.top1 - facts.top1:+.2f}")
    if options.results:
        record(options.results, [result])
        print(f"wrote {options.results}")


def _file(facts: zoo.Weights, options: argparse.Namespace) -> Path:
    if options.file is not None:
        return options.file
    return weights.get(facts, options.folder).path


def _kept(folder: Path | None) -> dict[str, Path]:
    """Row -> its file, of those in the folder."""
    try:
        entries = weights.kept_files(folder)
    except weights.WeightsError as error:
        raise CommandError(str(error)) from None
    return {
        facts.name: entries[key]
        for facts in zoo.published().values()
        for key in (facts.file_name, facts.name)
        if key in entries
    }


def _facts(name: str) -> zoo.Weights:
    rows = zoo.published()
    if name in rows:
        return rows[name]
    tagged = [key for key in rows if key.partition(".")[0] == name]
    if len(tagged) == 1:
        return rows[tagged[0]]
    close = tagged or difflib.get_close_matches(name, rows, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise CommandError(f"no weights are called {name}; {hint}run vssm zoo list to see all")


@contextmanager
def _explained(facts: zoo.Weights) -> Iterator[None]:
    """What goes wrong inside is one line for the user."""
    try:
        yield
    except weights.WeightsError as error:
        raise CommandError(f"the weights {facts.name} cannot be had: {error}") from None
    except (ValueError, FloatingPointError, OSError) as error:
        raise CommandError(f"{facts.name}: {error}") from None
