"""Vision and medical-imaging state-space models: scan ops that run on any device."""

from . import ops

__all__ = ["ops"]
__version__ = "0.1.0"
