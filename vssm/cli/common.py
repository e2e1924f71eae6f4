"""What the commands share: errors for the user, tables, remarks, the way a command is declared."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

DISCLAIMER = "research software, not a medical device: no result may be used for diagnosis or treatment"
WRONG_INPUT = 2
_MEDICAL_EXTRA = ("monai", "nibabel", "matplotlib", "accelerate")


class CommandError(Exception):
    """What the user gave cannot be used; the message is printed as one line."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_command(
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


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def is_terminal() -> bool:
    return sys.stderr.isatty()


def medical(module: str) -> object:
    """Import a module that needs the medical extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _MEDICAL_EXTRA:
            raise
        raise CommandError(f'{package} is not installed; run pip install "vssm[medical]"') from None


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def positive(text: str) -> int:
    """A whole number above 0 from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def usable_device(text: str) -> torch.device:
    """A device of this machine from the command line: cpu, cuda, cuda:1, ..."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    # torch without CUDA refuses it by an assertion
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({str(error).splitlines()[0]})") from None
    return device
