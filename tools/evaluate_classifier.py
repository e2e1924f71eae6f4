"""Evaluate a classifier on ImageNet-1k's validation set, ImageNet-V2, -A, -R or any folder of classes, at any sizes.

Pictures lie in one folder per class: n01440764 and so on (ImageNet-1k, -A, -R), 0 to 999 (ImageNet-V2). On -A and -R
only the classes with a folder compete, on the others all 1000. Sizes other than the model's show how robust it is to
resolution: pictures are resized and cropped in proportion, pyramids take them as they are, positional embeddings are
resampled. Every result is a row of a CSV file, in place of an older one of the same weights, data and size; the model
zoo's page (`python tools/model_table.py`) shows those in model_zoo/results.csv.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from timm.data import resolve_data_config
from torch import nn
from tqdm import tqdm

import vssm.models  # noqa: F401
from vssm import zoo
from vssm.checkpoint import load_official
from vssm.classification.rating import DATA_SETS, rate
from vssm.classification.results import as_line, record
from vssm.classification.trained import load_trained, read_trained
from vssm.cli.common import WRONG_INPUT, Parser, positive, usable_device
from vssm.hashing import file_sha256
from vssm.weights import WeightsError, get

EXAMPLE = """examples:
  python tools/evaluate_classifier.py vmamba_tiny --imagenet-val imagenet/val --amp bfloat16
  python tools/evaluate_classifier.py vmamba_tiny --imagenet-val imagenet/val --sizes 192 224 384 512 768 1024
  python tools/evaluate_classifier.py swin_tiny_patch4_window7_224 --imagenet-a imagenet-a --imagenet-r imagenet-r
  python tools/evaluate_classifier.py vmamba_tiny --weights runs/pets/best.safetensors --folder pets/test"""
FAILED = 1
PRECISIONS = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        folders = {name: getattr(options, name.replace("-", "_")) for name in DATA_SETS}
        if options.folder:
            folders[options.folder.name] = options.folder
        folders = {name: folder for name, folder in folders.items() if folder}
        if not folders:
            raise ValueError("give at least one folder of pictures, such as --imagenet-val FOLDER")
        _evaluate(options, folders)
    except torch.OutOfMemoryError:
        print(f"{parser.prog}: out of memory; give a smaller --batch-size", file=sys.stderr)
        return WRONG_INPUT
    except FloatingPointError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return FAILED
    except (ValueError, WeightsError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    print(f"wrote {options.output}")
    return 0


def _evaluate(options: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Record one row for each size and folder, the smallest size first, each as soon as it is known."""
    model, name, digest = None, "", ""
    config = resolve_data_config(
        {key: value for key in ("crop_pct", "interpolation") if (value := getattr(options, key))},
        pretrained_cfg=_cfg(options.model).to_dict(),
    )
    usual = config["input_size"][-1]
    for size in sorted(options.sizes or [usual]):
        # a model for one size only is made anew for each
        if model is None or _cfg(options.model).fixed_input_size:
            model, name, digest = _load(options, size)
            model = model.to(options.device).eval()
            if options.channels_last:
                model = model.to(memory_format=torch.channels_last)
            if options.compile:
                model.forward = torch.compile(model.forward)
        for data, folder in folders.items():
            result = rate(
                model,
                data,
                folder,
                size,
                config,
                weights=name,
                sha256=digest,
                # about the same memory at every size
                batch_size=max(1, round(options.batch_size * min(1, usual / size) ** 2)),
                workers=options.workers,
                amp=PRECISIONS[options.amp],
                progress=partial(tqdm, desc=f"{data} {size}", unit="batch", disable=None),
            )
            record(options.output, [result])
            print(as_line(result), flush=True)


def _cfg(name: str):
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        raise ValueError(f"no model is called {name}; run vssm list, or timm.list_models(), to see all")
    return cfg


def _load(options: argparse.Namespace, size: int) -> tuple[nn.Module, str, str]:
    """The model with its weights, the name of these in results, and the hash of their file."""
    cfg, bare = _cfg(options.model), options.model.partition(".")[0]
    # a model that takes one size only has its positional embeddings resampled when it is made
    arguments = {"img_size": size} if cfg.fixed_input_size else {}
    if options.num_classes:
        arguments["num_classes"] = options.num_classes
    facts = zoo.published("classification").get(f"{bare}.{cfg.tag}")
    path = options.weights
    trained = None if path is None else read_trained(path)
    if trained is not None:
        if trained.model != bare:
            raise ValueError(f"{path} holds a {trained.model}, not a {bare}")
        return load_trained(path, trained), bare, file_sha256(path)
    if path is None and facts is None:
        return timm.create_model(options.model, pretrained=True, **arguments), f"{bare}.{cfg.tag}", ""
    if path is None:
        path = get(facts).path
    if facts is None:
        overlay = {"file": str(path), "num_classes": options.num_classes or cfg.num_classes}
        try:
            model = timm.create_model(options.model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        except (RuntimeError, UnpicklingError) as error:
            raise ValueError(f"{path} does not fit {options.model} ({str(error).splitlines()[0]})") from None
    else:
        model = timm.create_model(options.model, **arguments)
        load_official(model, path)
    return model, bare if options.weights else facts.name, file_sha256(path)


def _parser() -> Parser:
    parser = Parser(
        prog="evaluate_classifier.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a name registered with timm, maybe with a tag")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="checkpoint (default: the published weights)")
    parser.add_argument("--num-classes", type=positive, metavar="N", help="of the model (default: that of its weights)")
    for name in DATA_SETS:
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help="pictures in class folders")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="any other pictures in class folders")
    parser.add_argument("--sizes", type=positive, nargs="+", metavar="PX", help="sides (default: the model's)")
    parser.add_argument("--crop-pct", type=float, help="side of the crop by the shorter side (default: the model's)")
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="of resizing (default: the model's)")
    parser.add_argument("--batch-size", type=positive, default=128, help="at the model's size (default: %(default)s)")
    parser.add_argument("--amp", choices=PRECISIONS, default="none", help="autocast (default: %(default)s)")
    parser.add_argument(
        "--channels-last", action="store_true", help="memory layout of the weights, which pictures follow"
    )
    parser.add_argument("--compile", action="store_true", help="compile the model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=device, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("model_zoo/results.csv"), metavar="CSV", help="default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
