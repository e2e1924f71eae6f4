"""Find or build onedl-mmcv for the torch that is installed, and print the path of the wheel.

onedl-mmcv is published as source and must be compiled against the torch it runs with, which takes about half an
hour. The wheel is kept in a cache keyed by torch's version, Python and machine; pip's own cache would take one made
for another torch. Looked for in this order: the folder in VSSM_WHEELS, ../shared/wheels/torchMAJOR.MINOR, the cache.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

PACKAGE = "onedl-mmcv"
NEEDS = ["setuptools>=77,<82", "wheel", "ninja"]
# Headers of torch from 2.14 on are C++20; the package's setup.py says C++17.
WRAPPER = '#!/bin/sh\nfor a; do shift; [ "$a" = -std=c++17 ] && a=-std=c++20; set -- "$@" "$a"; done\nexec g++ "$@"\n'


def version() -> tuple[str, str]:
    """torch's whole version without its build, and its major and minor part."""
    whole = torch.__version__.partition("+")[0]
    return whole, ".".join(whole.split(".")[:2])


def cache() -> Path:
    """Folder of the wheels for this torch, Python and machine."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vssm" / "wheels" / f"torch{version()[0]}-{sysconfig.get_config_var('SOABI')}-{platform.machine()}"


def fitting(folder: Path) -> Path | None:
    """The newest wheel in a folder that this Python can install."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(folder.glob(f"onedl_mmcv-*-{tag}-{tag}-*{platform.machine()}.whl"))
    return found[-1] if found else None


def find() -> Path | None:
    """A wheel that was built before."""
    given = os.environ.get("VSSM_WHEELS")
    shared = Path(__file__).resolve().parents[2] / "shared" / "wheels" / f"torch{version()[1]}"
    for folder in filter(None, (given and Path(given), shared, cache())):
        wheel = fitting(folder)
        if wheel:
            return wheel
    return None


def build() -> Path:
    """Build the wheel with the packages of this Python, and keep it.

    Raises:
        RuntimeError: the compiler or pip failed.
    """
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"building {PACKAGE} for torch {version()[0]}; this takes about half an hour on two cores", file=sys.stderr)
    run([sys.executable, "-m", "pip", "install", "-q", *NEEDS])
    with tempfile.TemporaryDirectory() as scratch:
        compiler = Path(scratch) / "c++"
        compiler.write_text(WRAPPER)
        compiler.chmod(0o755)
        environment = os.environ | {"MMCV_WITH_OPS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if tuple(map(int, version()[1].split("."))) >= (2, 14):
            environment["CXX"] = str(compiler)
        options = ["--no-build-isolation", "--no-deps", "--no-cache-dir", "-w", scratch]
        run([sys.executable, "-m", "pip", "wheel", *options, PACKAGE], environment)
        wheel = fitting(Path(scratch))
        if wheel is None:
            raise RuntimeError("pip built no wheel for this Python")
        partial = folder / f".{wheel.name}.partial"
        shutil.copyfile(wheel, partial)
        os.replace(partial, folder / wheel.name)
        return folder / wheel.name


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """A command whose output goes to standard error; RuntimeError if it fails."""
    if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
        raise RuntimeError(f"{' '.join(command)} failed; its output is above. A C++ compiler (g++) is needed")


def main() -> int:
    """Prints the wheel's path; exit status 1 if it cannot be built."""
    try:
        wheel = find() or build()
    except (RuntimeError, OSError) as error:
        print(f"openmmlab_wheel.py: {error}", file=sys.stderr)
        return 1
    print(f"onedl-mmcv for torch {version()[0]}: {wheel}", file=sys.stderr)
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
