"""Train a segmentation network on an nnU-Net folder, a datalist or pairs of files, and resume at any moment.

The run's folder gets plan.yaml (edit it between --plan-only and the run), last.pt and best.pt, metrics.csv,
tensorboard/, and at the end curves.png, worst_cases.png and bundle/, the best network as a MONAI bundle for
`vssm segment --bundle RUN/bundle` (`vssm export-bundle` writes one at any time). Several processes or machines: start
this file with `torchrun` or `accelerate launch`.
"""

import argparse
import sys
from functools import partial

from vssm.cli.common import WRONG_INPUT
from vssm.cli.training import INTERRUPTED, Bar, is_main_process, run_training, training_parser
from vssm.segmentation import Moment, TrainingOptions, plan_only, train
from vssm.segmentation.exporting import export_bundle
from vssm.training.options import read_options
from vssm.volumes.errors import VolumeError

EXAMPLES = """examples:
  python tools/train_segmenter.py --config configs/medical/abdomen_ct.yaml --output runs/ct --set data=Dataset701
  python tools/train_segmenter.py --config configs/medical/abdomen_ct.yaml --output runs/ct --resume
  torchrun --nproc-per-node 2 tools/train_segmenter.py --config configs/medical/brats2023.yaml --output runs/brats"""
PROG = "train_segmenter.py"
BUNDLE = "bundle"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = training_parser(PROG, __doc__, EXAMPLES)
    parser.add_argument("--plan-only", action="store_true", help="write plan.yaml for editing and stop")
    given = parser.parse_args(arguments)
    if given.output is None:
        parser.error("--output is needed, the folder of the run")
    bar = Bar()
    try:
        return run_training(PROG, partial(_train, given, bar), "set a smaller patch_size or batch_size")
    finally:
        bar.close()


def _train(given: argparse.Namespace, bar: Bar) -> int:
    def show(moment: Moment) -> None:
        dice = sum(moment.dice) / len(moment.dice)
        bar.show(moment.step, moment.steps, f"loss {moment.loss:.3f}, Dice {dice:.3f}")

    reading = partial(bar.over, what="reading cases", unit="case")
    options = read_options(TrainingOptions, given.config, given.set)
    if given.plan_only:
        print(f"wrote {plan_only(options, given.output, reading)}")
        return 0
    outcome = train(options, given.output, given.resume, show, reading)
    if outcome.interrupted:
        print(f"{PROG}: stopped after step {outcome.steps}; continue with --resume", file=sys.stderr)
        return INTERRUPTED
    if is_main_process():
        try:
            export_bundle(given.output, given.output / BUNDLE)
        except VolumeError as error:
            print(f"{PROG}: trained, but not exported: {error}", file=sys.stderr)
            return WRONG_INPUT
        print(
            f"best mean Dice in validation {outcome.best_dice:.4f}; wrote {given.output}, with the network in {BUNDLE}/"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
