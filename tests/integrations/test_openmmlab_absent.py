"""Without OpenMMLab's packages nothing of vssm asks for them, and what needs them says how to get them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg")
REMEDY = "run `make openmmlab` in a checkout of vssm"


@pytest.fixture
def python(tmp_path):
    """python(arguments, **modules): runs Python where the only packages of OpenMMLab are those with this source."""

    def run(*arguments, **modules):
        hidden = tmp_path / "modules"
        hidden.mkdir()
        for name in PACKAGES:
            missing = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')"
            (hidden / f"{name}.py").write_text(modules.get(name, missing))
        environment = os.environ | {"PYTHONPATH": f"{hidden}{os.pathsep}{ROOT}"}
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    return run


def test_vssm_imports_nothing_of_openmmlab(python):
    done = python(
        "-c",
        "import sys, vssm, vssm.models, vssm.networks, vssm.checkpoint, vssm.cli, vssm.integrations;"
        f"assert not set({PACKAGES!r}) & sys.modules.keys()",
        **dict.fromkeys(PACKAGES, ""),
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_named_with_the_command_that_gets_it(python):
    done = python("-c", "import vssm.integrations.openmmlab")
    assert f"ImportError: mmengine is not installed; {REMEDY}" in done.stderr


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"mmcv": "", "mmdet": ""}, "mmengine is not installed"),
        (
            {"mmengine": "", "mmcv": "raise ImportError('_ext.so: undefined symbol: _ZN3c10')"},
            "mmcv cannot be used (_ext.so: undefined symbol: _ZN3c10)",
        ),
        (
            {
                "mmengine": "",
                "mmcv": "import sys, types; sys.modules['mmcv.ops'] = types.ModuleType('mmcv.ops'); __path__ = []",
                "mmdet": "assert False, 'MMCV==3 is used but incompatible. Please install mmcv>=2, <2.3.'",
            },
            "mmdet cannot be used (MMCV==3 is used but incompatible. Please install mmcv>=2, <2.3.)",
        ),
    ],
)
def test_detect_says_what_does_not_fit(python, tmp_path, modules, message):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    arguments = [str(tmp_path / "picture.png"), "--config", "x.py", "--checkpoint", "x.pth"]
    done = python(str(ROOT / "tools" / "detect.py"), *arguments, **modules)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"detect.py: {message}; {REMEDY}, which installs versions that fit each other and this torch"
    )
