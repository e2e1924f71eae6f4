"""Train a classifier by a recipe of configs/imagenet on folders of pictures, tar files or what else timm reads.

The run's folder gets config.yaml, last.pt, best.safetensors, metrics.csv, tensorboard/, and at the end curves.png and
confusion.png. SIGTERM (pre-emptible machines) and Ctrl-C finish the step and save; --resume goes on there, after
`kill -9` from the last finished epoch, to the same numbers. Several processes or machines: start this file with
`torchrun` or `accelerate launch`.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from vssm.classification.fitting import BEST, Moment, Run, train
from vssm.classification.forecasting import as_lines, forecast
from vssm.classification.options import ClassifierOptions
from vssm.classification.throughput import throughput
from vssm.cli.common import print_table
from vssm.cli.training import INTERRUPTED, Bar, is_main_process, run_training, training_parser
from vssm.machine import device_name
from vssm.training.options import read_options

EXAMPLES = """examples:
  python tools/train_classifier.py --config configs/imagenet/digits.yaml --output runs/digits
  python tools/train_classifier.py --config configs/imagenet/vmamba_tiny.yaml --output runs/t --set data=imagenet
  torchrun --nproc-per-node 8 tools/train_classifier.py --config configs/imagenet/vssd_tiny.yaml --output runs/v
  torchrun --nproc-per-node 8 tools/train_classifier.py --config configs/imagenet/vssd_base.yaml --output runs/b \
      --set shard=true
  python tools/train_classifier.py --config configs/imagenet/vmamba_tiny.yaml --output runs/t --resume
  python tools/train_classifier.py --config configs/imagenet/vmamba_tiny.yaml --dry-run --set data=synthetic
  python tools/train_classifier.py --config configs/imagenet/vmamba_tiny.yaml --benchmark --set batch_size=64"""
PROG = "train_classifier.py"
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process if None); returns the exit status."""
    parser = training_parser(PROG, __doc__, EXAMPLES)
    parser.add_argument("--dry-run", action="store_true", help="print plan, memory and time by estimate, and stop")
    parser.add_argument(
        "--benchmark", action="store_true", help="train on noise for a few steps, beside peers; print speed and memory"
    )
    parser.add_argument("--peers", nargs="*", default=PEERS, metavar="MODEL", help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.output is None and not (given.dry_run or given.benchmark):
        parser.error("--output is needed, the folder of the run")
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
    if given.dry_run:
        run = Run(replace(options, shard=False), None)
        plan = as_lines(run, forecast(run, options.shard))
        if is_main_process():
            print("\n".join(plan))
        return 0
    if given.benchmark:
        if options.shard:
            raise ValueError("--benchmark trains on one device; set shard=false")
        _compare(options, given.peers)
        return 0
    outcome = train(options, given.output, given.resume, show, partial(bar.over, what="validation", unit="batch"))
    if outcome.signal is not None:
        if is_main_process():
            print(f"{PROG}: stopped after step {outcome.steps}; continue with --resume", file=sys.stderr)
        # who ends a machine wants no alarm
        return 0 if outcome.signal == signal.SIGTERM else INTERRUPTED
    if is_main_process():
        print(f"best top-1 in validation {outcome.best_top1:.2f} %; wrote {given.output}, with the network in {BEST}")
    return 0


def _compare(options: ClassifierOptions, peers: Sequence[str]) -> None:
    found = throughput(options, peers)
    own = found[0].median
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    measured = "highest memory of the device" if device.type == "cuda" else "memory by estimate"
    print(
        f"{device_name(device)}, {options.image_size} px, batch {options.batch_size}, precision {options.precision}; "
        f"{measured}"
    )
    rows = [("model", "parameters", "pictures/s", "least to most", "of the first", "GB")]
    for one in found:
        speeds = one.pictures_per_second
        spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
        rows.append(
            (
                one.model,
                f"{one.parameters / 1e6:.2f} M",
                f"{one.median:.1f}",
                spread,
                f"{one.median / own:.2f}",
                f"{one.memory / 1e9:.2f}",
            )
        )
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
