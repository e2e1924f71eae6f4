"""LBVim: official outputs and sizes, windows, directions, attention pooling."""

from functools import partial

import parity
import pytest
import timm
import torch
import torch.nn.functional as F
from families import create, images
from official import assert_names_convert, assert_parity, load_golden, model_of, official_state, stages_and_logits

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official
from vssm.layers.mamba import Mamba
from vssm.models.lbvim import AttentionPool, LocalMamba
from vssm.ops import use_reference

TOLERANCE = 1e-4
# Windows of 4, 8 and 16 tokens; 77 and 135 tokens end in a cut window.
FILES = ["lbvim_tiny", "lbvim_tiny_112x176", "lbvim_tiny_240x288", "lbvim_300", "lbvim_528"]
# Parameters at 224 x 224: of the official models; the small one differs from Vim's by what is counted below.
PARAMETERS = {"lbvim_tiny": 6419560, "lbvim_300": 14897200, "lbvim_528": 44823448}


def official_model(file: str, **kwargs) -> tuple[torch.nn.Module, dict]:
    golden = load_golden(file)
    model = model_of(golden, "_".join(file.split("_")[:2]), **kwargs).eval()
    load_official(model, official_state(golden))
    return model, golden


@pytest.mark.parametrize("file", FILES)
def test_logits_and_every_stream_equal_the_official_ones(file):
    model, golden = official_model(file)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert_parity(stages_and_logits(model, golden), golden, TOLERANCE)


def test_the_window_is_the_official_one_unless_it_is_set():
    golden = load_golden("lbvim_tiny_112x176")
    errors = {}
    for window in (4, 8, 16):
        model, _ = official_model("lbvim_tiny_112x176", window=window)
        errors[window] = parity.relative_error(
            stages_and_logits(model, golden)["logits"].numpy(), golden["outputs"]["logits"]
        )
    assert golden["scan_window"] == 4
    assert errors[4] < TOLERANCE and errors[8] > 0.05 and errors[16] > 0.05


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_published_size_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert len(model.blocks) == 24 and model.blocks[-1].drop_path.drop_prob == pytest.approx(0.05)
    assert not model.num_prefix_tokens


def test_the_small_variant_is_vim_small_without_the_second_direction_and_the_class_token():
    with torch.device("meta"):
        vim, small = timm.create_model("vim_small"), timm.create_model("lbvim_small")
    inner, rank, states = 768, 24, 16
    direction = inner * (4 + 1) + (rank + 2 * states) * inner + rank * inner + inner + states * inner + inner
    counts = [sum(p.numel() for p in model.parameters()) for model in (vim, small)]
    assert counts[0] - counts[1] == 24 * direction + 2 * 384


def test_own_names_pass_the_conversion_unchanged():
    with torch.device("meta"):
        model = timm.create_model("lbvim_528", img_size=(144, 240))
    assert_names_convert(model, "lbvim_528")


def test_the_norms_can_be_layer_norms_as_in_the_code_for_segmentation():
    layer_norm = partial(torch.nn.LayerNorm, eps=1e-5)
    model = create("lbvim_tiny", norm_layer=layer_norm)
    norms = [model.norm, *(block.norm for block in model.blocks)]
    assert {type(norm) for norm in norms} == {torch.nn.LayerNorm} and len(norms) == 6
    assert torch.isfinite(model(images(1, 3, 64, 48))).all()


def test_every_second_block_walks_backwards():
    model = create("lbvim_tiny")
    assert [block.mixer.backwards for block in model.blocks] == [False, True, False, True, False]


def test_the_mixer_looks_back_along_the_whole_sequence_and_ahead_within_its_window():
    torch.manual_seed(0)
    for backwards in (False, True):
        mixer = LocalMamba(8, d_state=4, window=4, backwards=backwards)
        x = torch.randn(1, 10, 8, requires_grad=True)
        for step in range(10):
            (seen,) = torch.autograd.grad(mixer(x)[0, 9 - step if backwards else step].sum(), x)
            seen = (seen[0] != 0).any(1)
            last = min(step // 4 * 4 + 3, 9)
            assert (seen.flip(0) if backwards else seen).tolist() == [i <= last for i in range(10)]


def test_a_window_of_one_step_is_mamba():
    mixer, mamba, x = LocalMamba(8, window=1), Mamba(8), torch.randn(2, 9, 8)
    mamba.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), mamba(x))
    backwards = LocalMamba(8, window=1, backwards=True)
    backwards.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(backwards(x), mamba(x.flip(1)).flip(1))


def test_the_definition_of_the_scan_gives_the_same_output():
    model, x = create("lbvim_tiny"), images(1, 3, 64, 48)
    want = model(x)
    with use_reference():
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_the_attention_pool_averages_values_by_their_keys_likeness_to_the_query():
    torch.manual_seed(0)
    pool, x = AttentionPool(12, 3), torch.randn(2, 5, 12)
    torch.nn.init.normal_(pool.kv.weight)
    keys, values = pool.kv(x).split(12, dim=2)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = torch.softmax(keys[..., part] @ pool.latent[0, 0, part] / 2, dim=1)
        heads.append((weights[..., None] * values[..., part]).sum(1))
    torch.testing.assert_close(pool(x), F.layer_norm(torch.cat(heads, 1), (12,), eps=1e-5))


def test_the_attention_pool_goes_with_its_name():
    model, x = create("lbvim_528"), images(1, 3, 64, 48)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features, pre_logits=True), model.attn_pool(features))
    model.reset_classifier(4)
    assert torch.equal(model.forward_head(features, pre_logits=True), model.attn_pool(features))
    model.reset_classifier(4, "avg")
    assert model.attn_pool is None and model(x).shape == (1, 4)
    assert create("lbvim_528", global_pool="avg").attn_pool is None
    assert create("lbvim_tiny", global_pool="map", num_classes=3)(x).shape == (1, 3)
