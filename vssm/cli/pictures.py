"""`vssm classify` and `vssm explain`: what a picture shows, and where a model looks."""

import argparse
import difflib
import os
from pathlib import Path

import timm
import torch

from ..classification.trained import Trained, load_trained, read_trained
from .common import CommandError, add_command, medical, note
from .info import model_names

_DEFAULT_MODEL = "vmamba_tiny"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare `classify` and `explain`."""
    classify = add_command(
        commands,
        _classify,
        "classify",
        "name what a picture shows (ImageNet classes, or those that a classifier of yours was trained on)",
        "vssm classify cat.jpg --model vmamba_tiny --weights vssm1_tiny_0230s_ckpt_epoch_264.pth",
    )
    _picture_and_model(classify)
    classify.add_argument("--topk", type=int, default=5, help="how many classes to print (default: %(default)s)")

    explain = add_command(
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


def _picture_and_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("picture", metavar="PICTURE", help="any picture file that Pillow reads")
    command.add_argument(
        "--model", help=f"a name from vssm list (default: what the file of weights says, else {_DEFAULT_MODEL})"
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--weights", metavar="FILE", help="official checkpoint (.pth), or a file of train_classifier.py"
    )
    source.add_argument("--random-weights", action="store_true", help="run without weights; the answer means nothing")


def _classify(options: argparse.Namespace) -> None:
    from timm.data import ImageNetInfo

    trained = _trained(options)
    labels = (trained and trained.classes) or ImageNetInfo().label_descriptions()
    if options.topk < 1 or (not trained and options.topk > len(labels)):
        raise CommandError(f"--topk must be between 1 and {len(labels)}, got {options.topk}")
    model, _, image = _model_and_image(options)
    with torch.inference_mode():
        probabilities = model(image)[0].softmax(dim=0)
    if len(labels) != len(probabilities):
        labels = [f"class {index}" for index in range(len(probabilities))]
    best = probabilities.topk(min(options.topk, len(labels)))
    for probability, index in zip(*(values.tolist() for values in best), strict=True):
        print(f"{100 * probability:5.1f} %  {labels[index]}")


def _trained(options: argparse.Namespace) -> Trained | None:
    """What a file of train_classifier.py says of itself; None for other files, and without one."""
    if options.weights is None or options.model is not None:
        return None
    return read_trained(Path(options.weights))


def _explain(options: argparse.Namespace) -> None:
    import numpy as np

    from vssm import explain

    medical("matplotlib")
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
        note(f"the last scan ({scan.layer}) does not walk the map of the features; its attention is not drawn")
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

    trained = _trained(options)
    names, name = model_names(), options.model or _DEFAULT_MODEL
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CommandError(f"no model is called {name}; {hint}run vssm list to see all")
    if options.weights is None and not options.random_weights:
        tag = timm.get_pretrained_cfg(name).tag
        raise CommandError(
            f"{name} has no weights of its own; run vssm zoo get {name}.{tag} and pass the file that "
            "it prints as --weights FILE, or pass --random-weights to try the command with an answer that means nothing"
        )
    try:
        with Image.open(options.picture) as picture:
            picture = picture.convert("RGB")
    except FileNotFoundError:
        raise CommandError(f"{options.picture}: no such file; check the name") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise CommandError(f"{options.picture}: is not a picture that can be read ({error})") from None
    if trained:
        try:
            model = load_trained(Path(options.weights), trained)
        except ValueError as error:
            raise CommandError(f"--weights: {error}") from None
        return model, trained.data_config, create_transform(**trained.data_config)(picture)[None]
    model = timm.create_model(name).eval()
    if options.weights is not None:
        try:
            load_official(model, options.weights)
        except (OSError, ValueError) as error:
            raise CommandError(f"--weights: {error}") from None
    else:
        note("random weights; the results mean nothing")
    config = resolve_data_config({}, model=model)
    return model, config, create_transform(**config)(picture)[None]
