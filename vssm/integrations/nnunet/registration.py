"""Make nnU-Net find vssm's trainers: one file in its folder of trainers, written and removed on command only."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["EXTERNAL_FOLDER", "RegistrationError", "install", "require_nnunet", "uninstall"]

# What nnUNet_extTrainer may name; holds the file that `install` copies.
EXTERNAL_FOLDER = Path(__file__).parent / "external"
_FILE = EXTERNAL_FOLDER / "vssm_trainers.py"
# In every version of that file: tells it from a file of somebody else.
_MARK = "vssm.integrations.nnunet"
_MINIMUM = (2, 6)
_REMEDY = 'run pip install "vssm[nnunet]"'


class RegistrationError(RuntimeError):
    """The file cannot be written or removed; the message is one sentence: what, why and what to do."""


def require_nnunet() -> Path:
    """The folder of the installed nnunetv2 package.

    Raises:
        ImportError: nnunetv2 is not installed, or too old.
    """
    spec = find_spec("nnunetv2")
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        spec = None
    if spec is None:
        raise ImportError(f"nnunetv2 is not installed; {_REMEDY}")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _MINIMUM:
        raise ImportError(f"nnunetv2 {found} is too old, vssm's trainers need 2.6 or later; {_REMEDY}")
    return Path(spec.origin).parent


def install() -> Path:
    """Write the file that leads nnU-Net to the trainers, over an earlier one of vssm if there is one; returns its path.

    Raises:
        ImportError: as `require_nnunet`.
        RegistrationError: the folder cannot be written to, or a file of that name is not vssm's.
    """
    target = _target()
    try:
        target.write_text(_FILE.read_text())
    except OSError as error:
        raise RegistrationError(
            f"cannot write {target} ({error.strerror}); with nnunetv2 2.8 or later set the environment variable "
            f"nnUNet_extTrainer to {EXTERNAL_FOLDER} instead, or install nnunetv2 where you may write"
        ) from None
    return target


def uninstall() -> Path:
    """Remove what `install` wrote; returns its path.

    Raises:
        ImportError: as `require_nnunet`.
        RegistrationError: there is no such file, it is not vssm's, or it cannot be removed.
    """
    target = _target()
    try:
        target.unlink()
    except FileNotFoundError:
        raise RegistrationError(f"{target} does not exist: the trainers are not installed") from None
    except OSError as error:
        raise RegistrationError(f"cannot remove {target} ({error.strerror}); remove it by hand") from None
    return target


def _target() -> Path:
    target = require_nnunet() / "training" / "nnUNetTrainer" / _FILE.name
    if target.exists() and _MARK not in target.read_text():
        raise RegistrationError(f"{target} was not written by vssm; move it elsewhere first")
    return target
