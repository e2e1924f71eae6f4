"""VSSMBackbone against the official dense-prediction wrappers, on the same weights."""

import official
import packages  # noqa: F401  skips without OpenMMLab
import parity
import pytest
import torch
from torch import nn

from vssm.checkpoint import load_official
from vssm.integrations.openmmlab import VimPyramid, VSSMBackbone

TOLERANCE = {"vssd": 2e-4}
QUARTERS = (5, 11, 17, 23)
# Golden file -> arguments of the backbone beside its name.
PYRAMIDS = ("vmamba_tiny", "msvmamba_tiny", "vssd_tiny", "efficientvmamba_small")
LBVIM = {
    "dense_lbvim_tiny": {"out_indices": QUARTERS, "block_norm": "layer"},
    "dense_lbvim_tiny_odd": {"out_indices": QUARTERS, "block_norm": "layer"},
    "dense_lbvim_tiny_det": {"out_indices": (23,)},
}
VIM = {"dense_vim_tiny": False, "dense_vim_tiny_odd": False, "dense_vim_tiny_residual": True}


def assert_levels_agree(golden, levels, tolerance, name="level"):
    for i, level in enumerate(levels):
        error = parity.relative_error(level.numpy(), golden["outputs"][f"{name}{i}"])
        assert error < tolerance, f"{name}{i}: {error}"


def image(golden):
    return torch.from_numpy(parity.fill_input(golden["input"]))


@pytest.mark.parametrize("size", ["", "_odd"])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramids_give_the_official_levels(name, size):
    golden = official.load_golden(f"dense_{name}{size}")
    backbone = VSSMBackbone(name).eval()
    load_official(backbone, official.official_state(golden))
    with torch.inference_mode():
        levels = backbone(image(golden))
    assert len(levels) == 4
    assert_levels_agree(golden, levels, TOLERANCE.get(name.partition("_")[0], 1e-4))


@pytest.mark.parametrize("file", LBVIM)
def test_lbvim_gives_the_official_levels(file):
    golden = official.load_golden(file)
    positions = dict(golden["state"])["pos_embed"]
    side = int(positions[1] ** 0.5) * 16
    backbone = VSSMBackbone("lbvim_tiny", residual=False, img_size=side, **LBVIM[file]).eval()
    load_official(backbone, official.official_state(golden))
    with torch.inference_mode():
        levels = backbone(image(golden))
    assert_levels_agree(golden, levels, 1e-4)


@pytest.mark.parametrize("file", VIM)
def test_vim_and_its_pyramid_give_the_official_levels(file):
    golden = official.load_golden(file)
    model = nn.Module()
    model.backbone = VSSMBackbone(
        "vim_tiny", QUARTERS, out_norm=False, residual=VIM[file], class_token=False, global_pool="avg",
        img_size=golden["input"][2],
    )  # fmt: skip
    model.neck = VimPyramid(192)
    state = {f"backbone.{key}": value for key, value in official.official_state(golden).items()}
    load_official(model, state)
    model.eval()
    with torch.inference_mode():
        maps = model.backbone(image(golden))
        assert_levels_agree(golden, maps, 1e-4, "feat")
        assert_levels_agree(golden, model.neck(maps), 1e-4)
