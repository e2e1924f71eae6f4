"""Effective receptive fields of models whose fields are known, and pictures of them."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vssm.models  # noqa: F401
from vssm.explain import draw_over, effective_receptive_field


class TwoConvolutions(nn.Module):
    """3 x 3 convolutions, the second of stride 2."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)])

    def forward_intermediates(self, x, indices=None, intermediates_only=True):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps if indices is None else [maps[i] for i in indices]


def test_convolutions_see_exactly_their_kernels():
    model, x = TwoConvolutions(), torch.randn(3, 2, 16, 12)
    first = effective_receptive_field(model, x, 0, (5, 4))
    assert first.shape == (16, 12) and (first >= 0).all()
    seen = first.nonzero()
    assert seen.amin(0).tolist() == [4, 3] and seen.amax(0).tolist() == [6, 5] and len(seen) == 9
    # Unit (4, 3) of the second map is centred on pixel (8, 6) and reaches two pixels to every side.
    second = effective_receptive_field(model, x).nonzero()
    assert second.amin(0).tolist() == [6, 4] and second.amax(0).tolist() == [10, 8] and len(second) == 25
    weight = model.layers[0].weight
    torch.testing.assert_close(first[4, 3], weight[:, :, 0, 0].sum(0).abs().sum())


def test_a_scan_sees_the_whole_picture_and_a_convolution_does_not():
    torch.manual_seed(0)
    model = timm.create_model("vmamba_tiny", depths=(1,), dims=(16,), num_classes=0).eval()
    # Inits of small output projections keep gradients small but not zero.
    field = effective_receptive_field(model, torch.randn(2, 3, 64, 64), 0)
    assert (field > 0).float().mean() > 0.9


def test_a_place_outside_the_map_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 0\) lies outside the map of 8 x 6"):
        effective_receptive_field(TwoConvolutions(), torch.randn(1, 2, 16, 12), -1, (8, 0))


def test_maps_of_any_size_are_drawn_over_the_picture(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    maps = {"attention": torch.rand(3, 4), "field": torch.rand(48, 64)}
    figure = draw_over(picture, maps, mark=(0.5, 0.25))
    figure.savefig(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert [panel.get_title() for panel in figure.axes] == ["picture", "attention", "field"]
    overlaid = figure.axes[1].images[1].get_array()
    assert overlaid.shape == (48, 64)
    np.testing.assert_allclose(overlaid[0, 0], maps["attention"][0, 0])
    with pytest.raises(ValueError, match=r"the map 'x' must have shape \(height, width\), got \(5,\)"):
        draw_over(picture, {"x": torch.rand(5)})
