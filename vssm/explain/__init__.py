"""What a model looks at: the hidden attention of its scans and the effective receptive field of its features."""

from .attention import ScanCall, hidden_attention, scan_calls
from .drawing import draw_over
from .receptive_field import effective_receptive_field

__all__ = ["ScanCall", "draw_over", "effective_receptive_field", "hidden_attention", "scan_calls"]
