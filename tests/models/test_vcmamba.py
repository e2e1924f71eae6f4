"""VCMamba's own choices, its positional map, and the official outputs on the same weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from families import create, images
from official import assert_parity, load_golden, meta_state, official_state, recorded_taps
from parity import fill_input
from timm.models.efficientformer_v2 import ConvMlpWithNorm
from torch import nn

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official, remap
from vssm.layers.snake_mamba import SnakeMamba
from vssm.models.vcmamba import OFFICIAL_NAMES, ConvBlock, MambaBlock, PositionMap, VCMamba

# Of the official models, with both classifiers.
PARAMETERS = {"vcmamba_small": 10478720, "vcmamba_medium": 21072176, "vcmamba_base": 31450832}
BLOCKS = {"vcmamba_small": (4, 4, 12, 8), "vcmamba_medium": (4, 4, 12, 6), "vcmamba_base": (4, 4, 12, 6)}
FIRST = "stages.3.blocks.1.position.pos_embed"


def test_logits_stem_and_every_stage_equal_the_official_ones():
    golden = load_golden("vcmamba_small")
    model = timm.create_model("vcmamba_small").eval()
    load_official(model, official_state(golden))
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert_parity(recorded_taps(model, golden, {"stem": "stem"}), golden, 1e-4)


def test_a_mamba_layer_and_its_mixer_equal_the_official_ones():
    golden = load_golden("vcmamba_layer")
    block = MambaBlock(48, mlp_ratio=4.0, drop_path=0.0, position=nn.Identity()).eval()
    official = {f"network.6.0.{key}": value for key, value in official_state(golden).items()}
    own = {key.removeprefix("stages.3.blocks.0."): value for key, value in remap(official, OFFICIAL_NAMES).items()}
    block.load_state_dict(own)
    assert sum(p.numel() for p in block.parameters()) == golden["params"]
    got = {}
    block.mixer.register_forward_hook(lambda module, args, out: got.update(mixer=out))
    with torch.inference_mode():
        got["out"] = block(torch.from_numpy(fill_input(golden["input"])))
    assert_parity(got, golden, 1e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_published_size_blocks_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert tuple(len(stage.blocks) for stage in model.stages) == BLOCKS[name]
    kinds = [type(block) for stage in model.stages for block in stage.blocks]
    assert kinds == [ConvBlock] * (sum(BLOCKS[name]) - 4) + [MambaBlock] * 4
    assert [hasattr(block.position, "pos_embed") for block in model.stages[3].blocks[-4:]] == [
        True,
        False,
        False,
        False,
    ]
    assert model.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)


def test_own_names_pass_the_conversion_unchanged():
    with torch.device("meta"):
        model = timm.create_model("vcmamba_small")
    own = model.convert_official(meta_state("vcmamba_small"))
    assert {key for key in model.state_dict() if not key.endswith("num_batches_tracked")} == own.keys()
    assert model.convert_official(own).keys() == own.keys()


def test_both_classifiers_come_from_the_official_file_and_the_output_is_their_mean():
    golden = load_golden("vcmamba_small")
    model, state = timm.create_model("vcmamba_small").eval(), official_state(golden)
    load_official(model, state)
    assert torch.equal(model.head.fc.weight, state["head.weight"])
    assert torch.equal(model.head_dist.weight, state["dist_head.weight"])
    model.set_distilled_training()
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        features = model.forward_features(x)
        mean = model.forward_head(features)
        # The pair comes in training only.
        model.train()
        labels, teacher = model.forward_head(features)
    torch.testing.assert_close(mean, (labels + teacher) / 2)
    assert not torch.allclose(labels, teacher)


def test_the_positional_map_is_added_once_before_the_first_mamba_layer():
    model, x = create("vcmamba_small", img_size=64, depths=(1, 1, 1, 3), mambas=2), images(1, 3, 64, 64)
    first = model.stages[3].blocks[1]
    seen = {}
    model.stages[3].blocks[0].register_forward_hook(lambda module, args, out: seen.update(before=out))
    first.norm1.register_forward_pre_hook(lambda module, args: seen.update(after=args[0]))
    model(x)
    torch.testing.assert_close(seen["after"], seen["before"] + first.position.pos_embed)
    assert isinstance(model.stages[3].blocks[2].position, nn.Identity)


def test_the_positional_map_is_resampled_for_maps_of_other_sizes():
    torch.manual_seed(0)
    layer = PositionMap(4, (7, 7))
    zeros = torch.zeros(2, 4, 5, 9)
    wanted = F.interpolate(layer.pos_embed, size=(5, 9), mode="bicubic")
    torch.testing.assert_close(layer(zeros), wanted.expand(2, -1, -1, -1))
    assert torch.equal(layer(torch.zeros(1, 4, 7, 7)), layer.pos_embed)


@pytest.mark.parametrize(
    ("img_size", "size"), [(224, (7, 7)), (256, (8, 8)), ((100, 96), (4, 3)), (225, (8, 8)), ((32, 64), (1, 2))]
)
def test_the_positional_map_has_the_size_of_the_last_stages_map(img_size, size):
    model = create("vcmamba_small", img_size=img_size)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert model.get_parameter(FIRST).shape[2:] == size
    assert model.forward_features(images(1, 3, height, width)).shape[2:] == size


def test_weights_made_for_another_image_size_load_with_a_resampled_map():
    at_224 = create("vcmamba_small")
    model = create("vcmamba_small", seed=1, img_size=(96, 160))
    load_official(model, at_224.state_dict())
    wanted = F.interpolate(at_224.get_parameter(FIRST), size=(3, 5), mode="bicubic")
    torch.testing.assert_close(model.get_parameter(FIRST), wanted)
    x = images(1, 3, 96, 160)
    torch.testing.assert_close(model(x), at_224(x))


def test_a_positional_map_of_other_channels_is_refused():
    state = create("vcmamba_small").state_dict()
    state[FIRST] = torch.zeros(1, 50, 7, 7)
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 50, 7, 7\), the model needs \(1, 48, 7, 7\)"):
        load_official(create("vcmamba_small"), state)


def test_weights_start_as_in_the_official_code():
    torch.manual_seed(0)
    model = create("vcmamba_small", dims=(64, 64, 64, 128))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert layer.bias is None or not layer.bias.any()
        if isinstance(layer, ConvMlpWithNorm):
            for conv in (layer.fc1.conv, layer.fc2.conv):
                assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1) and not conv.bias.any()
            assert layer.mid.conv.bias.any()
        if isinstance(layer, ConvBlock):
            assert torch.equal(layer.scale, torch.full_like(layer.scale, 1e-5))
        if isinstance(layer, SnakeMamba):
            assert not layer.dt_proj.bias.any() and layer.in_conv.conv.bias.any()
    for conv, fan_in in ((model.stem[0].conv, 27), (model.stem[1].conv, 288)):
        assert conv.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1) and not conv.bias.any()
    assert model.get_parameter(FIRST).std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (8, 16)}, r"one entry per stage each, got \(1, 1, 1, 2\) and \(8, 16\)"),
        ({"mambas": 0}, "from 1 to 2, the depth of the last stage, got 0"),
        ({"mambas": 3}, "from 1 to 2, the depth of the last stage, got 3"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VCMamba(**{"depths": (1, 1, 1, 2), "dims": (8, 8, 8, 8), "mambas": 1, **change})
