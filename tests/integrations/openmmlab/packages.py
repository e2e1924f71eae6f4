"""OpenMMLab's packages for the tests: skipped without them; models built from the shipped configurations."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

_REASON = "needs OpenMMLab's packages: make test-openmmlab"
mmengine = pytest.importorskip("mmengine", reason=_REASON, exc_type=ImportError)
for _name in ("mmcv", "mmdet", "mmseg"):
    pytest.importorskip(_name, reason=_REASON, exc_type=ImportError)

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "openmmlab"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))


def read(name: str, **changes: object) -> mmengine.Config:
    """A shipped configuration with changes by dotted key."""
    config = mmengine.Config.fromfile(CONFIGS / f"{name}.py")
    config.merge_from_dict({"model.backbone.pretrained": False, **changes})
    return config


def folder(package: str) -> str:
    """Where an installed package lies."""
    return find_spec(package).submodule_search_locations[0]
