"""Vim: official outputs and sizes, its class token, initial weights of the backward scans."""

import argparse

import pytest
import timm
import torch
from families import create, images
from official import assert_names_convert, assert_parity, load_golden, model_of, official_state, stages_and_logits

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official

TOLERANCE = 1e-4
# File -> registered name, where they differ. An even number of patches, and an odd one (77).
FILES = {"vim_tiny": None, "vim_tiny_224": "vim_tiny", "vim_tiny_stride8": None, "vim_base": None}
# Parameters at 224 x 224: tiny, its stride of 8 and base counted from the official state dicts; small is published as
# 26M, and its stride of 8 adds positions.
PARAMETERS = {
    "vim_tiny": 7148008,
    "vim_small": 25796584,
    "vim_base": 97598440,
    "vim_tiny_stride8": 7250344,
    "vim_small_stride8": 25796584 + (27 * 27 - 14 * 14) * 384,
}
DROP_PATH = {"vim_small": 0.05}


@pytest.mark.parametrize("file", FILES)
def test_logits_and_every_stream_equal_the_official_ones(file):
    golden = load_golden(file)
    model = model_of(golden, FILES[file]).eval()
    load_official(model, official_state(golden))
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert_parity(stages_and_logits(model, golden), golden, TOLERANCE)


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_published_size_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert len(model.blocks) == 24 and model.stride == (8 if name.endswith("stride8") else 16)
    assert getattr(model.blocks[-1].drop_path, "drop_prob", 0.0) == pytest.approx(DROP_PATH.get(name, 0.0))


def test_create_model_reads_an_official_file_at_another_image_size(tmp_path):
    golden = load_golden("vim_tiny_224")
    state = official_state(golden)
    # Training files hold the options of the run in this form.
    torch.save({"model": state, "args": argparse.Namespace(model="vim")}, tmp_path / "vim_t.pth")
    overlay = {"file": str(tmp_path / "vim_t.pth")}
    model = timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert_parity(stages_and_logits(model, golden), golden, TOLERANCE)
    other = timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, img_size=96, num_classes=5)
    # The class token's embedding is number 98 of 197, and number 18 of 37.
    assert other.pos_embed.shape == (1, 37, 192)
    assert torch.equal(other.pos_embed[:, 18], state["pos_embed"][:, 98])
    assert torch.equal(other.blocks[0].norm.weight, state["layers.0.norm.weight"])


def test_own_names_pass_the_conversion_unchanged():
    with torch.device("meta"):
        model = timm.create_model("vim_tiny", img_size=(64, 96))
    assert_names_convert(model, "vim_tiny")


def test_the_class_token_is_pooled_and_can_be_left_out():
    model, x = create("vim_tiny"), images(1, 3, 64, 48)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
    without = create("vim_tiny", class_token=False, global_pool="avg")
    assert without.forward_features(x).shape == (1, 12, 16) and without.cls_token is None
    with pytest.raises(ValueError, match="global_pool is 'token'; this model has"):
        create("vim_tiny", class_token=False)


def test_both_directions_reach_the_class_token():
    model, x = create("vim_tiny", depth=1), images(1, 3, 64, 48).requires_grad_()
    model(x).sum().backward()
    seen = x.grad.abs().amax(1).unflatten(2, (3, 16)).unflatten(1, (4, 16)).amax((2, 4))
    assert (seen > 0).all()


def test_the_backward_scans_start_from_a_step_bias_of_0_and_the_forward_ones_do_not():
    model = create("vim_tiny")
    for block in model.blocks:
        forward, backward = block.mixer.scan.dt_projs_bias
        assert not backward.any()
        assert (forward < -2).all()
    assert model.cls_token.std() < 0.05
