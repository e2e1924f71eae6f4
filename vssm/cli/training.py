"""What the commands that train share: their arguments, their progress bar, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from ..training.diagnosis import TrainingError
from .common import WRONG_INPUT, Parser

FAILED = 1
INTERRUPTED = 130


def is_main_process() -> bool:
    """Whether this is the first, or the only, process of a launch by torchrun or accelerate."""
    return os.environ.get("RANK", "0") == "0"


def training_parser(prog: str, description: str | None, examples: str) -> Parser:
    """A parser with --config, --output (which may be missing), --set and --resume."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of options")
    parser.add_argument("--output", type=Path, help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an option")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    return parser


class Bar:
    """A progress bar over steps; silent on all but the first process, and where nobody looks at a terminal."""

    def __init__(self, unit: str = "step") -> None:
        self.unit = unit
        self.quiet = not is_main_process() or not sys.stderr.isatty()
        self.bar: tqdm | None = None

    def show(self, step: int, steps: int, text: str) -> None:
        """`step` of `steps` are done; `text` stands behind the bar."""
        if self.bar is None:
            self.bar = tqdm(total=steps, initial=step - 1, unit=self.unit, disable=self.quiet)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def over(self, things: Iterable, what: str, unit: str) -> Iterable:
        """Progress over things that take long each."""
        return tqdm(things, desc=what, unit=unit, disable=self.quiet, leave=False)

    def close(self) -> None:
        """Leave the line."""
        if self.bar is not None:
            self.bar.close()


def run_training(prog: str, body: Callable[[], int], too_large: str) -> int:
    """Exit status of `body()`, with one line on standard error in place of a traceback for what users can mend.

    Args:
        too_large: what to do where memory is short.
    """
    try:
        return body()
    except TrainingError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return FAILED
    except torch.OutOfMemoryError:
        print(f"{prog}: out of memory; {too_large}", file=sys.stderr)
        return WRONG_INPUT
    except (ValueError, OSError) as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
