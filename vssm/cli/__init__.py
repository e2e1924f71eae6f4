"""The command `vssm`.

Anything wrong with what the user gave is one line on standard error and exit status 2. Results go to standard output,
remarks and progress to standard error. MONAI and nibabel are imported by the commands that need them only.
"""

import os
import sys
from collections.abc import Sequence

import vssm

from . import info, pictures, volumes, zoo
from .common import WRONG_INPUT, CommandError, Parser
from .info import model_names

__all__ = ["main", "model_names"]

_INTERRUPTED = 130


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
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"vssm {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has seen enough; keep Python from writing the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="vssm",
        description="Vision and medical-imaging state-space models.",
        epilog="example: vssm segment T1.nii.gz -o tissue.nii.gz",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vssm {vssm.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (info, volumes, pictures, zoo):
        module.add_commands(commands)
    return parser
