"""Train a segmentation network on an nnU-Net folder, a datalist or pairs of files, and resume at any moment.

The run's folder gets plan.yaml (edit it between --plan-only and the run), last.pt and best.pt, metrics.csv,
tensorboard/, and at the end curves.png, worst_cases.png and bundle/, the best network as a MONAI bundle for
`vssm segment --bundle RUN/bundle` (`vssm export-bundle` writes one at any time). Several processes or machines: start
this file with `torchrun` or `accelerate launch`.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from vssm.cli.common import WRONG_INPUT, Parser
from vssm.segmentation import Moment, TrainingOptions, plan_only, train
from vssm.segmentation.exporting import export_bundle
from vssm.training.diagnosis import TrainingError
from vssm.training.options import read_options
from vssm.volumes.errors import VolumeError

EXAMPLE = """examples:
  python tools/train_segmenter.py --config configs/medical/abdomen_ct.yaml --output runs/ct --set data=Dataset701
  python tools/train_segmenter.py --config configs/medical/abdomen_ct.yaml --output runs/ct --resume
  torchrun --nproc-per-node 2 tools/train_segmenter.py --config configs/medical/brats2023.yaml --output runs/brats"""
FAILED = 1
BUNDLE = "bundle"
INTERRUPTED = 130


class Bar:
    """A progress bar with the loss and the Dice of the current patches."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: tqdm | None = None

    def __call__(self, moment: Moment) -> None:
        if self.bar is None:
            self.bar = tqdm(total=moment.steps, initial=moment.step - 1, unit="step", disable=self.quiet)
        dice = sum(moment.dice) / len(moment.dice)
        self.bar.set_postfix_str(f"loss {moment.loss:.3f}, Dice {dice:.3f}", refresh=False)
        self.bar.update()

    def cases(self, cases: Iterable) -> Iterable:
        """Progress over cases that are read."""
        return tqdm(cases, desc="reading cases", unit="case", disable=self.quiet, leave=False)

    def close(self) -> None:
        """Leave the line."""
        if self.bar is not None:
            self.bar.close()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = Parser(
        prog="train_segmenter.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of options")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an option")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--plan-only", action="store_true", help="write plan.yaml for editing and stop")
    given = parser.parse_args(arguments)
    # one bar, whatever the number of processes
    bar = Bar(quiet=os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty())
    try:
        options = read_options(TrainingOptions, given.config, given.set)
        if given.plan_only:
            print(f"wrote {plan_only(options, given.output, bar.cases)}")
            return 0
        outcome = train(options, given.output, given.resume, bar, bar.cases)
    except TrainingError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return FAILED
    except torch.OutOfMemoryError:
        print(f"{parser.prog}: out of memory; set a smaller patch_size or batch_size", file=sys.stderr)
        return WRONG_INPUT
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        bar.close()
    if outcome.interrupted:
        print(f"{parser.prog}: stopped after step {outcome.steps}; continue with --resume", file=sys.stderr)
        return INTERRUPTED
    if os.environ.get("RANK", "0") == "0":
        try:
            export_bundle(given.output, given.output / BUNDLE)
        except VolumeError as error:
            print(f"{parser.prog}: trained, but not exported: {error}", file=sys.stderr)
            return WRONG_INPUT
        print(
            f"best mean Dice in validation {outcome.best_dice:.4f}; wrote {given.output}, with the network in {BUNDLE}/"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
