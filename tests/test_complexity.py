"""Counts of parameters and operations: by hand on small models, and the papers' figures on published ones."""

import pytest
import timm
import torch
from torch import nn

import vssm.models  # noqa: F401
from vssm.complexity import complexity


class OneScan(nn.Module):
    def __init__(self):
        super().__init__()
        from vssm.layers.mamba import Mamba

        self.mixer = Mamba(8, d_state=4, d_conv=4, expand=2, dt_rank=3)

    def forward(self, x):
        return self.mixer(x.flatten(2).transpose(1, 2))


def test_products_count_multiply_adds_and_scans_count_operations():
    length, inner = 6 * 5, 16
    products = length * (8 * 2 * inner + inner * (3 + 2 * 4) + 3 * inner + inner * 8 + 4 * inner)
    # D and the gate count one each.
    scan = length * inner * (9 * 4 + 2)
    counted = complexity(OneScan(), (8, 6, 5))
    assert counted.gflops * 1e9 == pytest.approx(products + scan)


def test_convolution_and_linear_layers_are_counted_and_frozen_parameters_are_not():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 16, 7))
    model[0].requires_grad_(False)
    counted = complexity(model, (3, 4, 4))
    assert counted.gflops * 1e9 == 16 * 9 * 3 * 5 + 80 * 7
    assert counted.parameters == 80 * 7 + 7


def test_the_model_is_left_as_it_was():
    model = timm.create_model("vmamba_tiny", depths=(1, 1), dims=(8, 16)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    complexity(model, (3, 32, 32))
    assert model.training and all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Published GFLOPs at 224 x 224, given with one decimal: VMamba's README (commit 2ed52ea), VSSD's (commit 87b753b).
# The latter counts the products of the scan, 2 * L * N * P, for one of the H heads; here are micro's others.
_OTHER_HEADS = 2 * 48 * 48 * (2 * 3136 * 1 + 2 * 784 * 3 + 8 * 196 * 7) / 1e9


@pytest.mark.parametrize(
    ("name", "published"), [("vmamba_tiny", 4.9), ("vmambav0_tiny", 5.6), ("vssd_micro", 2.3 + _OTHER_HEADS)]
)
def test_published_figures_are_met(name, published):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert complexity(model, (3, 224, 224)).gflops == pytest.approx(published, abs=0.05)
