"""Maps drawn over the picture they belong to. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_over(picture: np.ndarray, maps: Mapping[str, Tensor], mark: tuple[float, float] | None = None) -> Figure:
    """The picture, and beside it a panel for every map, laid over the picture in colour.

    Args:
        picture: (H, W, 3) or (H, W), uint8, or float in 0..1.
        maps: title -> tensor (h, w) of any size; absolute values are shown, each panel scaled to its 99.5th percentile.
        mark: (row, column) of a point to mark, as fractions of height and width.

    Returns:
        a matplotlib figure; `figure.savefig("out.png")` writes it.

    Raises:
        ValueError: a map that is not two-dimensional.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    figure = Figure(figsize=(4 * (1 + len(maps)), 4 * height / width + 0.4), layout="constrained")
    panels = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    for panel, title in zip(panels, ("picture", *maps), strict=True):
        panel.imshow(picture, cmap="gray", vmin=0, vmax=255 if picture.dtype == np.uint8 else 1)
        panel.set_title(title)
        panel.set_axis_off()
        if mark is not None:
            panel.plot(mark[1] * width - 0.5, mark[0] * height - 0.5, "+", color="white", markersize=12, mew=2)
    for panel, (title, values) in zip(panels[1:], maps.items(), strict=True):
        if values.ndim != 2:
            raise ValueError(f"the map {title!r} must have shape (height, width), got {tuple(values.shape)}")
        strength = values.detach().abs().float().cpu()[None, None]
        strength = interpolate(strength, size=(height, width), mode="bilinear")[0, 0].numpy()
        top = float(np.percentile(strength, 99.5)) or 1.0
        panel.imshow(strength, cmap="inferno", vmin=0, vmax=top, alpha=0.7)
    return figure
