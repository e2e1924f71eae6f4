"""Blending windows: MONAI's values exactly, into an array of ours; the window that would fit where memory is short."""

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from vssm.volumes import VolumeError
from vssm.volumes.windows import blend_windows

CPU = torch.device("cpu")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Conv3d(2, 3, 3, padding=1)


def blended(image, network, window, labels=3, **options):
    total = np.zeros((labels, *image.shape[1:]), np.float32)
    blend_windows(image, network, window, total, device=CPU, **options)
    return torch.from_numpy(total)


@pytest.mark.parametrize("shape", [(20, 9, 31), (8, 8, 8), (5, 12, 3), (1, 1, 40)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": 0.0, "mode": "constant", "sw_batch_size": 4},
        {"overlap": [0.5, 0.25, 0.75], "sigma_scale": 0.3, "sw_batch_size": 3, "padding_mode": "replicate"},
        {"overlap": 0.99, "cval": -2.0},
    ],
    ids=["defaults", "constant", "everything", "steps of one"],
)
def test_the_logits_are_those_of_monai(network, shape, options):
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    window = {"roi_size": [8, 8, 8], "mode": "gaussian"} | options
    with torch.inference_mode():
        expected = SlidingWindowInferer(**window)(image[None], network)[0]
    # the same sums in the same order; windows of a batch may be convolved in another order
    torch.testing.assert_close(blended(image, network, window), expected, rtol=1e-5, atol=1e-6)


def test_mirrored_passes_are_averaged(network):
    image = torch.randn(2, 8, 8, 8)
    window = {"roi_size": [8, 8, 8]}
    with torch.inference_mode():
        passes = [network(image[None].flip(axes)).flip(axes)[0] for axes in ([], [2], [4], [2, 4])]
    found = blended(image, network, window, mirror=("x", "z"))
    torch.testing.assert_close(found, sum(passes) / 4)
    assert not torch.allclose(found, passes[0], atol=1e-3)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_without_memory_the_largest_window_found_to_fit_is_named(error):
    class Large(nn.Module):
        def forward(self, x):
            if x[0, 0].numel() > 8 * 16 * 16:
                raise error
            if x.shape[2] == 8 and x.shape[3] == 16:
                raise ValueError("sizes must be equal")
            return x

    with pytest.raises(
        VolumeError, match="windows of 16 x 16 x 32 voxels; windows of 8 x 8 x 16 fit, use --patch-size 8 8 16"
    ):
        blended(torch.zeros(1, 16, 16, 32), Large(), {"roi_size": [16, 16, 32]}, labels=1)


def test_without_memory_for_any_window_none_is_named():
    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(VolumeError, match="no smaller window fits either"):
        blended(torch.zeros(1, 16, 16, 16), Full(), {"roi_size": [16, 16, 16]}, labels=1)


def test_other_errors_of_a_network_pass_as_they_are():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        blended(torch.zeros(1, 16, 16, 16), Broken(), {"roi_size": [16, 16, 16]}, labels=1)
