"""tools/demo_brain.py as a module for the tests; Python finds its neighbours when it is run, but not when imported."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import demo_brain

__all__ = ["demo_brain"]
