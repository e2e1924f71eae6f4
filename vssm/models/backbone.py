"""What every vssm backbone shares of timm's model protocol, whatever the shape of its features."""

from timm.layers import register_notrace_function
from torch import Tensor, nn

MIN_SIZE = 32


# torch.fx cannot follow comparisons of sizes; the check is one node of a traced graph.
@register_notrace_function
def checked_image(x: Tensor, in_chans: int, min_size: int = MIN_SIZE) -> Tensor:
    """x itself, if it is a batch of images (B, in_chans, H, W) with H and W of at least min_size, else ValueError."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must have shape (batch, {in_chans}, height, width), got {tuple(x.shape)}")
    height, width = x.shape[2:]
    if height < min_size or width < min_size:
        raise ValueError(
            f"images must be at least {min_size} x {min_size} pixels, got {height} x {width}; "
            f"pad or resize to {max(height, min_size)} x {max(width, min_size)}"
        )
    return x


class Backbone(nn.Module):
    """Base of `Pyramid` and `Isotropic`. Their `forward` is not here: torch.fx replaces functions in its file alone."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that layers declare in `exempt_from_decay`; timm adds biases and one-dimensional ones itself."""
        return {
            f"{prefix}.{name}".removeprefix(".")
            for prefix, module in self.named_modules()
            for name in getattr(module, "exempt_from_decay", ())
        }
