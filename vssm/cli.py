"""The command `vssm`: info, list, segment, classify, explain.

Anything wrong with what the user gave is one line on standard error and exit status 2. Results go to standard output,
remarks and progress to standard error. MONAI and nibabel are imported by the commands that need them only.
"""

import argparse
import difflib
import fnmatch
import importlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import timm
import torch

import vssm
from vssm import zoo
from vssm.complexity import complexity

_DISCLAIMER = "research software, not a medical device: no result may be used for diagnosis or treatment"
_DEFAULT_MODEL = "vmamba_tiny"
_MEDICAL_EXTRA = ("monai", "nibabel", "matplotlib")
_WRONG_INPUT = 2
_INTERRUPTED = 130


class CommandError(Exception):
    """What the user gave cannot be used; the message is printed as one line."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None).

    Returns:
        the exit status: 0, 2 for input that cannot be used, 130 if interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"vssm {options.command}:", " ".join(str(error).split()), file=sys.stderr)
        return _WRONG_INPUT
    except KeyboardInterrupt:
        print(f"vssm {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has seen enough; keep Python from writing the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="vssm",
        description="Vision and medical-imaging state-space models.",
        epilog="example: vssm segment T1.nii.gz -o tissue.nii.gz",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vssm {vssm.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    _command(commands, _info, "info", "versions, and which kernel serves each op on each device", "vssm info")

    listing = _command(commands, _list, "list", "models and networks with their sizes", "vssm list 'vmamba_*'")
    listing.add_argument("pattern", nargs="?", default="*", help="part of the name, or a pattern with * and ?")

    segment = _command(
        commands,
        _segment,
        "segment",
        "label the voxels of a CT or MR volume",
        "vssm segment T1.nii.gz -o tissue.nii.gz --overlay tissue.png",
        f"This is {_DISCLAIMER}. The default bundle learned brain tissue from one template and is a demonstration.",
    )
    segment.add_argument("image", metavar="IMAGE", help="volume, .nii or .nii.gz")
    segment.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="label map, .nii or .nii.gz; replaced if it exists"
    )
    segment.add_argument(
        "--bundle", help="folder of a MONAI bundle, or the name of one that ships with vssm (default: brain tissue)"
    )
    segment.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is cuda, else cpu")
    segment.add_argument("--overlap", type=float, help="of neighbouring windows, 0 to below 1 (default: the bundle's)")
    segment.add_argument("--overlay", metavar="PNG", help="also draw three planes with contours")
    segment.add_argument("--quiet", action="store_true", help="print warnings and errors only")

    classify = _command(
        commands,
        _classify,
        "classify",
        "name what a picture shows (ImageNet classes)",
        "vssm classify cat.jpg --model vmamba_tiny --weights vssm1_tiny_0230s_ckpt_epoch_264.pth",
    )
    _picture_and_model(classify)
    classify.add_argument("--topk", type=int, default=5, help="how many classes to print (default: %(default)s)")

    explain = _command(
        commands,
        _explain,
        "explain",
        "draw what a model looks at: hidden attention of its last scan and effective receptive field",
        "vssm explain cat.jpg -o looks.png --weights vssm1_tiny_0230s_ckpt_epoch_264.pth --point 0.3 0.6",
    )
    _picture_and_model(explain)
    explain.add_argument("-o", "--output", metavar="PNG", required=True, help="picture to write; replaced if it exists")
    explain.add_argument(
        "--point",
        nargs=2,
        type=float,
        default=(0.5, 0.5),
        metavar=("ROW", "COLUMN"),
        help="which point looks, as fractions of height and width (default: the centre)",
    )
    return parser


def _picture_and_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("picture", metavar="PICTURE", help="any picture file that Pillow reads")
    command.add_argument("--model", default=_DEFAULT_MODEL, help="a name from vssm list (default: %(default)s)")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--weights", metavar="FILE", help="official checkpoint (.pth) or safetensors file")
    source.add_argument("--random-weights", action="store_true", help="run without weights; the answer means nothing")


def _command(
    commands: argparse._SubParsersAction,
    run: Callable[[argparse.Namespace], None],
    name: str,
    summary: str,
    example: str,
    remark: str = "",
) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}. {remark}"
    parser = commands.add_parser(
        name, help=summary, description=description, epilog=f"example: {example}", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def _medical(module: str) -> object:
    """Import a module that needs the medical extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _MEDICAL_EXTRA:
            raise
        raise CommandError(f'{package} is not installed; run pip install "vssm[medical]"') from None


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
    _table(
        [("op", "device", "kernel", ""), *((row.op, row.device, row.kernel, row.reason) for row in backends.status())]
    )


def _list(options: argparse.Namespace) -> None:
    pattern = options.pattern if set(options.pattern) & set("*?[") else f"*{options.pattern}*"
    rows = [_model_row(name) for name in filter(_matches(pattern), model_names())]
    try:
        networks = _medical("vssm.networks").__all__
    except CommandError as error:
        networks = []
        _note(f"networks are not listed: {error}")
    rows += [(name, "by arguments", "", "any", "", "") for name in filter(_matches(pattern), networks)]
    if not rows:
        raise CommandError(f"nothing matches {options.pattern!r}; run vssm list without a pattern to see all")
    _table([("name", "parameters", "GFLOPs", "input", "published top-1", "licence of weights"), *rows])


def _model_row(name: str) -> tuple[str, ...]:
    row = zoo.measured().get(name)
    if row is None:
        size = timm.get_pretrained_cfg(name).input_size
        # shapes without storage: counting needs no weights
        with torch.device("meta"):
            counted = complexity(timm.create_model(name), size)
    else:
        size, counted = row.input_size, row
    weights = [facts for key, facts in zoo.published().items() if key.split(".")[0] == name]
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


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _segment(options: argparse.Namespace) -> None:
    volumes = _medical("vssm.volumes")
    if options.overlay is not None:
        _medical("matplotlib")
    start = time.perf_counter()
    try:
        result = volumes.segment_file(
            options.image,
            options.output,
            bundle=options.bundle,
            device=options.device,
            overlap=options.overlap,
            overlay=options.overlay,
            progress=not options.quiet and _is_terminal(),
        )
    except volumes.VolumeError as error:
        raise CommandError(str(error)) from None
    for text in result.notes:
        _note(text)
    if options.quiet:
        return
    _table(
        [
            ("label", "name", "voxels", "ml"),
            *((str(s.label), s.name, str(s.voxels), f"{s.millilitres:.1f}") for s in result.segments),
        ]
    )
    print(f"wrote {options.output} in {time.perf_counter() - start:.1f} s")
    _note(_DISCLAIMER)


def _classify(options: argparse.Namespace) -> None:
    from timm.data import ImageNetInfo

    labels = ImageNetInfo().label_descriptions()
    if not 1 <= options.topk <= len(labels):
        raise CommandError(f"--topk must be between 1 and {len(labels)}, got {options.topk}")
    model, _, image = _model_and_image(options)
    with torch.inference_mode():
        probabilities = model(image)[0].softmax(dim=0)
    for probability, index in zip(*(values.tolist() for values in probabilities.topk(options.topk)), strict=True):
        print(f"{100 * probability:5.1f} %  {labels[index]}")


def _explain(options: argparse.Namespace) -> None:
    import numpy as np

    from vssm import explain

    _medical("matplotlib")
    row, column = options.point
    if not (0 <= row < 1 and 0 <= column < 1):
        raise CommandError(f"--point takes two fractions from 0 to below 1, got {row:g} {column:g}")
    folder = os.path.dirname(os.path.abspath(options.output))
    if not options.output.lower().endswith(".png") or not os.path.isdir(folder):
        raise CommandError(f"--output: {options.output} must name a .png file in a folder that exists")
    model, config, image = _model_and_image(options)
    features = model.forward_intermediates(image, intermediates_only=True)[-1]
    height, width = features.shape[2:]
    place = int(row * height), int(column * width)
    field = explain.effective_receptive_field(model, image, -1, place)
    maps = {"effective receptive field": field}
    scan = explain.scan_calls(model, image)[-1]
    # A sequence with other tokens than the map's has no place on the picture.
    if scan.op.startswith("cross_") and scan.positions % (height * width) == 0:
        scale = round((scan.positions // (height * width)) ** 0.5)
        rows, columns = height * scale, width * scale
        query = int(row * rows) * columns + int(column * columns)
        maps["hidden attention, last scan"] = scan.attention([query])[0, 0].view(rows, columns)
    else:
        _note(f"the last scan ({scan.layer}) does not walk the map of the features; its attention is not drawn")
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (image[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    figure = explain.draw_over(np.ascontiguousarray(pixels), maps, mark=(row, column))
    partial = f"{options.output}.part"
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, options.output)
    print(f"wrote {options.output}")


def _model_and_image(options: argparse.Namespace) -> tuple[torch.nn.Module, dict, torch.Tensor]:
    """The model in evaluation mode, how it wants pictures, and the picture made so, (1, 3, H, W)."""
    from PIL import Image, UnidentifiedImageError
    from timm.data import create_transform, resolve_data_config

    from vssm.checkpoint import load_official

    names = model_names()
    if options.model not in names:
        close = difflib.get_close_matches(options.model, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CommandError(f"no model is called {options.model}; {hint}run vssm list to see all")
    if options.weights is None and not options.random_weights:
        url = timm.get_pretrained_cfg(options.model).url
        raise CommandError(
            f"{options.model} has no weights of its own; download {url} and pass it as --weights FILE, "
            "or pass --random-weights to try the command with an answer that means nothing"
        )
    try:
        with Image.open(options.picture) as picture:
            picture = picture.convert("RGB")
    except FileNotFoundError:
        raise CommandError(f"{options.picture}: no such file; check the name") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise CommandError(f"{options.picture}: is not a picture that can be read ({error})") from None
    model = timm.create_model(options.model).eval()
    if options.weights is not None:
        try:
            load_official(model, options.weights)
        except (OSError, ValueError) as error:
            raise CommandError(f"--weights: {error}") from None
    else:
        _note("random weights; the results mean nothing")
    config = resolve_data_config({}, model=model)
    return model, config, create_transform(**config)(picture)[None]
