"""Train a small 3-D U-Mamba on simulated scans of one hemisphere and measure it on the other.

The network learns grey and white matter from the left half of the ICBM 2009a T1 template, degraded anew for every step
with noise and intensity non-uniformity, and labels a degraded scan of the whole. Dice on the right half is printed
beside two threshold methods tuned on the left half and the same network without its Mamba layers. The template is
mirror-symmetric: the right half shows the left one's anatomy mirrored, under noise and a field never seen before.
"""

import argparse
import dataclasses
import gzip
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import monai
import nibabel
import numpy as np
import torch
from brain_bundle import write_bundle
from monai.bundle import ConfigParser
from torch import Tensor, nn
from tqdm import tqdm

import vssm
from vssm.training.options import Range, read_options
from vssm.volumes import foreground_ml, load_bundle, predict_volume, read_volume, write_labels
from vssm.volumes.comparison import draw_comparison
from vssm.volumes.phantom import LABELS, Phantom, load_phantom, simulate_scan
from vssm.volumes.thresholds import Thresholds, tune_thresholds
from vssm.volumes.training import PatchSampler, Recipe, Step, TrainingError, dice_scores, fit
from vssm.volumes.writing import atomic_file

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "medical" / "demo_brain.yaml"
EXAMPLE = """examples:
  python tools/demo_brain.py
  python tools/demo_brain.py --output trial --set steps=50 --set seed=1
  vssm segment demo/input.nii.gz -o tissue.nii.gz --bundle demo/bundle"""
WRONG_INPUT = 2
FAILED = 1


@dataclass(frozen=True)
class Options:
    """The keys of the configuration file, which explains them."""

    bundle: str
    seed: Annotated[int, Range(0, 2**31)]
    resolution_mm: Annotated[int, Range(1, 8)]
    train_box_mm: Annotated[list, Range(-1000, 1000, (3, 2))]
    test_box_mm: Annotated[list, Range(-1000, 1000, (3, 2))]
    noise: Annotated[float, Range(0, 1)]
    nonuniformity: Annotated[float, Range(0, 1)]
    evaluation_seed: Annotated[int, Range(0, 2**31)]
    tuning_scans: Annotated[int, Range(1, 100)]
    smoothing_voxels: Annotated[list, Range(0, 10, (None,))]
    steps: Annotated[int, Range(2, 10**6)]
    patch_size: Annotated[list, Range(4, 256, (3,), whole=True)]
    batch_size: Annotated[int, Range(1, 64)]
    patches_anywhere: Annotated[float, Range(0, 1)]
    mirror_axes: Annotated[list, Range(0, 2, (None,), whole=True)]
    learning_rate: Annotated[float, Range(1e-7, 1)]
    warmup: Annotated[float, Range(0, 0.9)]
    weight_decay: Annotated[float, Range(0, 1)]
    max_gradient: Annotated[float, Range(1e-3, 1e6)]
    average_decay: Annotated[float, Range(0, 0.9999)]


class Demonstration:
    """The data and the measurements of one run.

    Only `intensity` and `labels` of the training box reach tuning and training; the template as a whole is used for the
    evaluated scan alone.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.bundle_folder = ROOT / options.bundle
        self.definition = json.loads((self.bundle_folder / "configs" / "inference.json").read_text(encoding="utf-8"))
        self.phantom: Phantom = load_phantom(options.resolution_mm)
        box = self.phantom.box(options.train_box_mm)
        self.intensity, self.labels = self.phantom.intensity[box], self.phantom.labels[box]
        self.test_box = self.phantom.box(options.test_box_mm)
        self.scan = self._scan(self.phantom.intensity, torch.Generator().manual_seed(options.evaluation_seed))

    def _scan(self, intensity: Tensor, generator: torch.Generator, share: tuple[float, float] = (1, 1)) -> Tensor:
        noise, nonuniformity = share[0] * self.options.noise, share[1] * self.options.nonuniformity
        return simulate_scan(intensity, self.phantom.brightest, noise, nonuniformity, generator)

    def tune(self, sigmas: list[float]) -> Thresholds:
        """Thresholds tuned on scans of the training box, degraded as strongly as the evaluated one."""
        generator = torch.Generator().manual_seed(self.options.seed)
        scans = [self._scan(self.intensity, generator) for _ in range(self.options.tuning_scans)]
        return tune_thresholds(scans, [self.labels] * len(scans), sigmas)

    def bundle_network(self, **changes: Any) -> nn.Module:
        """The bundle's network with `changes` to its arguments and random weights."""
        return build(self.definition | {"network_def": self.definition["network_def"] | changes}, "network_def")

    def train(self, title: str, make: Callable[[], nn.Module]) -> nn.Module:
        """What `make` makes, of one channel and all labels, trained from random weights on the training box.

        Every call sees the same patches in the same order.
        """
        options = self.options
        torch.manual_seed(options.seed)
        network = make()
        # the bundle's last step of preprocessing is the one that concerns intensities
        normalize = build(self.definition, "preprocessing").transforms[-1]
        generator = torch.Generator().manual_seed(options.seed)
        sampler = PatchSampler(self.labels, options.patch_size, options.patches_anywhere, generator)

        def next_batch() -> tuple[Tensor, Tensor]:
            # strong degradation, the harder case, comes more often than weak
            share = (torch.rand(2, generator=generator) ** 0.25).tolist()
            scan = self._scan(self.intensity, generator, share)[None]
            scan = normalize({"image": scan})["image"].as_tensor()
            pairs = torch.cat([scan, self.labels[None]])  # float32 holds labels exactly
            patches = []
            for _ in range(options.batch_size):
                patch = pairs[(slice(None), *sampler())]
                mirrored = torch.rand(len(options.mirror_axes), generator=generator) < 0.5
                axes = [axis + 1 for axis, flip in zip(options.mirror_axes, mirrored, strict=True) if flip]
                patches.append(patch.flip(axes))
            images, labels = torch.stack(patches).split(1, dim=1)
            return images, labels.long()

        recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
        with tqdm(total=options.steps, desc=title, unit="step") as bar:

            def show(step: Step) -> None:
                grey, white = step.dice
                bar.set_postfix_str(f"loss {step.loss:.3f}, Dice grey {grey:.3f} white {white:.3f}", refresh=False)
                bar.update()

            return fit(network, next_batch, recipe, show)

    def score(self, labels: Tensor) -> dict[str, float]:
        """Dice of a segmentation of the evaluated scan inside the test box."""
        grey, white = dice_scores(labels[self.test_box], self.phantom.labels[self.test_box], len(LABELS))
        return {"gm": round(grey, 4), "wm": round(white, 4)}

    def draw(self, labels: np.ndarray, dice: dict[str, float], path: Path) -> None:
        """Contours of truth and result on planes through the middle of the test box's brain."""
        inside = torch.zeros_like(self.phantom.labels)
        inside[self.test_box] = self.phantom.labels[self.test_box]
        middle = inside.nonzero().double().mean(dim=0).round().int().tolist()
        affine = self.phantom.image.affine
        draw_comparison(
            self.scan.numpy(),
            {"truth": self.phantom.labels.numpy(), "U-Mamba": labels},
            LABELS,
            tuple(middle),
            "trained left of the dashed line, held out right of it: "
            f"Dice {dice['gm']:.3f} grey, {dice['wm']:.3f} white matter\n"
            f"{100 * self.options.noise:g} % noise, {100 * self.options.nonuniformity:g} % non-uniformity",
            path,
            midline=round(-affine[0, 3] / affine[0, 0]),
        )


def build(definition: dict, name: str) -> Any:
    """A component of a bundle's configuration, made anew."""
    return ConfigParser(definition).get_parsed_content(name)


def run(options: Options, output: Path, command: str, export: Path | None = None) -> dict[str, Any]:
    """Do all of it, write the results under `output` and the bundle also to `export`, and return the report.

    Raises:
        ValueError: an option does not fit the data or the bundle.
        TrainingError: the loss was not finite.
    """
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    demonstration = Demonstration(options)
    write_scan(demonstration, output / "input.nii.gz")
    volume = read_volume(output / "input.nii.gz")

    baselines = {}
    for name, sigmas in (("threshold", [0.0]), ("smoothed_threshold", options.smoothing_voxels)):
        thresholds = demonstration.tune(sigmas)
        baselines[name] = demonstration.score(thresholds(demonstration.scan)) | dataclasses.asdict(thresholds)

    network = demonstration.train("U-Mamba", demonstration.bundle_network)
    control = demonstration.train("without Mamba", lambda: demonstration.bundle_network(mixer="none"))
    report = {
        "dice": {},
        "baselines": baselines,
        "control": {},
        "seconds": 0.0,
        "parameters": {"network": count(network), "control": count(control)},
        "options": dataclasses.asdict(options),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "versions": {module.__name__: module.__version__ for module in (vssm, torch, monai, np)},
    }

    # from here on the very path of `vssm segment`
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    learned_from = {
        "field_of_view_mm": (volume.spacing * volume.voxels.shape).tolist(),
        "foreground_ml": round(foreground_ml(volume.voxels, volume.affine)),
    }
    write_bundle(demonstration.bundle_folder, output / "bundle", weights, learned_from)
    bundle = load_bundle(output / "bundle")
    labels = predict_volume(volume, bundle, device="cpu", progress=True)
    control_labels = predict_volume(volume, dataclasses.replace(bundle, network=control), device="cpu", progress=True)
    report["dice"] = demonstration.score(torch.from_numpy(labels))
    report["control"] = demonstration.score(torch.from_numpy(control_labels))
    write_labels(labels, volume, output / "segmentation.nii.gz")
    demonstration.draw(labels, report["dice"], output / "overlay.png")
    report["seconds"] = round(time.perf_counter() - start, 1)
    with atomic_file(output / "report.json") as stream:
        stream.write(json.dumps(report, indent=2).encode() + b"\n")
    for folder in filter(None, (output / "bundle", export)):
        write_bundle(demonstration.bundle_folder, folder, weights, learned_from, report)
    return report


def write_scan(demonstration: Demonstration, path: Path) -> None:
    """Write the evaluated scan as float32 with the template's geometry."""
    template = demonstration.phantom.image
    image = nibabel.Nifti1Image(demonstration.scan.numpy(), template.affine, template.header)
    image.set_data_dtype(np.float32)
    with atomic_file(path) as stream:
        stream.write(gzip.compress(image.to_bytes(), mtime=0))


def count(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def show(report: dict[str, Any], output: Path) -> None:
    """Print the report as a table."""
    baselines, parameters, options = report["baselines"], report["parameters"], report["options"]
    sigma = baselines["smoothed_threshold"]["sigma"]
    rows = {
        "two thresholds": baselines["threshold"],
        f"two thresholds, smoothed ({sigma:g} voxels)": baselines["smoothed_threshold"],
        f"without Mamba ({parameters['control']:,} parameters)": report["control"],
        f"U-Mamba ({parameters['network']:,} parameters)": report["dice"],
    }
    print(
        f"\nDice on the held-out side at {100 * options['noise']:g} % noise and "
        f"{100 * options['nonuniformity']:g} % non-uniformity"
    )
    print(f"{'':<40}{'grey':>8}{'white':>8}{'mean':>8}")
    for name, dice in rows.items():
        print(f"{name:<40}{dice['gm']:8.3f}{dice['wm']:8.3f}{mean(dice):8.3f}")
    best = max(mean(dice) for dice in baselines.values())
    print(
        f"U-Mamba against the better baseline {mean(report['dice']) - best:+.3f}, "
        f"against itself without Mamba {mean(report['dice']) - mean(report['control']):+.3f}"
    )
    print(f"wrote {output}/segmentation.nii.gz, overlay.png, report.json, input.nii.gz and bundle/ ", end="")
    print(f"in {report['seconds']:.0f} s")


def mean(dice: dict[str, float]) -> float:
    """Mean Dice of both tissues."""
    return (dice["gm"] + dice["wm"]) / 2


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = Parser(
        prog="demo_brain.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file of options (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results (default: demo)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an option")
    parser.add_argument("--export-bundle", type=Path, metavar="DIR", help="also write the trained bundle to DIR")
    given = parser.parse_args(arguments)
    command = " ".join(["python tools/demo_brain.py", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        report = run(read_options(Options, given.config, given.set), given.output, command, given.export_bundle)
    except TrainingError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return FAILED
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    show(report, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
