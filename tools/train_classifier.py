"""Train a classifier by a recipe of configs/imagenet on folders of pictures, tar files or what else timm reads.

The run's folder gets config.yaml, last.pt, best.safetensors, metrics.csv, tensorboard/, and at the end curves.png and
confusion.png. SIGTERM (pre-emptible machines) and Ctrl-C finish the step and save; --resume goes on there, after
`kill -9` from the last finished epoch, to the same numbers. Several processes or machines: start this file with
`torchrun` or `accelerate launch`.
"""

import argparse
import signal
import sys
from functools import partial

from vssm.classification.fitting import BEST, Moment, train
from vssm.classification.options import ClassifierOptions
from vssm.cli.training import INTERRUPTED, Bar, is_main_process, run_training, training_parser
from vssm.training.options import read_options

EXAMPLES = """examples:
  python tools/train_classifier.py --config configs/imagenet/digits.yaml --output runs/digits
  python tools/train_classifier.py --config configs/imagenet/vmamba_tiny.yaml --output runs/t --set data=imagenet
  torchrun --nproc-per-node 8 tools/train_classifier.py --config configs/imagenet/vssd_tiny.yaml --output runs/v
  python tools/train_classifier.py --config configs/imagenet/vmamba_tiny.yaml --output runs/t --resume"""
PROG = "train_classifier.py"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    given = training_parser(PROG, __doc__, EXAMPLES).parse_args(arguments)
    bar = Bar()
    try:
        return run_training(PROG, partial(_train, given, bar), "set a smaller batch_size, or checkpoint_gradients=true")
    finally:
        bar.close()


def _train(given: argparse.Namespace, bar: Bar) -> int:
    def show(moment: Moment) -> None:
        speed = f"{moment.pictures_per_second:.0f} pictures/s, {100 * moment.waited:.0f} % waiting for data"
        bar.show(moment.step, moment.steps, f"loss {moment.loss:.3f}, {speed}")

    options = read_options(ClassifierOptions, given.config, given.set)
    outcome = train(options, given.output, given.resume, show, partial(bar.over, what="validation", unit="batch"))
    if outcome.signal is not None:
        if is_main_process():
            print(f"{PROG}: stopped after step {outcome.steps}; continue with --resume", file=sys.stderr)
        # who ends a machine wants no alarm
        return 0 if outcome.signal == signal.SIGTERM else INTERRUPTED
    if is_main_process():
        print(f"best top-1 in validation {outcome.best_top1:.2f} %; wrote {given.output}, with the network in {BEST}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
