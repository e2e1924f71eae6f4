"""HRVMamba's own choices, what timm needs of parallel branches, and the official outputs on the same weights."""

import pytest
import timm
import torch
from families import create, family, images
from official import assert_parity, load_golden, meta_state, official_state
from parity import fill_input
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import vssm.models  # noqa: F401
from vssm.checkpoint import load_official, remap
from vssm.layers.dvss import DSS2D, DVSSBlock, ESInB
from vssm.layers.routes import CrossRoutes
from vssm.models.hrvmamba import OFFICIAL_NAMES, HRVMamba

NAMES = ["hrvmamba_nano", "hrvmamba_tiny", "hrvmamba_small", "hrvmamba_base"]
# Of the official models; tiny's from its layers, the others also in the golden files.
PARAMETERS = dict(zip(NAMES, (12284240, 14066728, 20101976, 60548520), strict=True))
DROP_PATH = dict(zip(NAMES, (0.1, 0.1, 0.2, 0.2), strict=True))
BRANCHES = ["hrvmamba_nano", "hrvmamba_base"]


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def branch_maps_and_logits(model: nn.Module, golden: dict) -> dict[str, torch.Tensor]:
    """{"stage0", "stage1_b0", ..., "neck", "logits"} for the input of the golden file."""
    got = {}

    def keep(name):
        def hook(module, args, out):
            named = enumerate(out) if isinstance(out, list) and name != "stage0" else [("", out)]
            got.update({f"{name}_b{i}" if i != "" else name: x[0] if isinstance(x, list) else x for i, x in named})

        return hook

    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(keep(f"stage{i}"))
    model.neck.register_forward_hook(keep("neck"))
    with torch.inference_mode():
        return got | {"logits": model(torch.from_numpy(fill_input(golden["input"])))}


@pytest.mark.parametrize("file", ["hrvmamba_nano", "hrvmamba_small", "hrvmamba_base"])
def test_logits_neck_and_every_branch_of_every_stage_equal_the_official_ones(file):
    golden = load_golden(file)
    model = timm.create_model(file).eval()
    load_official(model, official_state(golden))
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert_parity(branch_maps_and_logits(model, golden), golden, 1e-3)


@pytest.mark.parametrize(
    ("file", "dim", "smooth", "light"),
    [
        ("hrvmamba_block", 32, False, False),
        ("hrvmamba_block80", 80, True, False),
        ("hrvmamba_block_se", 16, False, True),
    ],
)
def test_a_block_its_deformable_layer_its_scan_and_its_mixer_equal_the_official_ones(file, dim, smooth, light):
    golden = load_golden(file)
    mixer = DSS2D(dim, CrossRoutes(), smooth_offsets=smooth, gate=light)
    block = DVSSBlock(dim, mixer, mlp_ratio=2.0, drop_path=0.0, position=light).eval()
    place = "stages.1.units.0.branches.0.blocks.0."
    official = {f"stage2.0.branches.0.0.{key}": value for key, value in official_state(golden).items()}
    block.load_state_dict({key.removeprefix(place): value for key, value in remap(official, OFFICIAL_NAMES).items()})
    assert sum(p.numel() for p in block.parameters()) == golden["params"]
    got = {}
    mixer.deform.register_forward_hook(lambda module, args, out: got.update(dcn=out))
    mixer.norm.register_forward_pre_hook(lambda module, args: got.update(scan=channels_first(*args)))
    mixer.register_forward_hook(lambda module, args, out: got.update(op=channels_first(out)))
    x = torch.from_numpy(fill_input(golden["input"]))
    with torch.inference_mode():
        got["out"] = channels_first(block(x.permute(0, 2, 3, 1)))
    assert_parity(got, golden, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_variants_have_the_published_size_parts_and_stochastic_depth(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    block = model.stages[-1].units[-1].branches[-1].blocks[-1]
    assert block.drop_path.drop_prob == pytest.approx(DROP_PATH[name])
    light = name in ("hrvmamba_nano", "hrvmamba_tiny")
    assert isinstance(block.cpe1, nn.Identity) == isinstance(block.mixer.gate, nn.Identity) == (not light)
    assert isinstance(block.mixer.deform.offset_mask_dw, nn.Conv2d) == (name == "hrvmamba_base")
    assert block.mixer.deform.groups == block.mixer.scan.dt_rank == model.feature_info[-1]["num_chs"] // 16
    assert model.pretrained_cfg["input_size"][1] == (224 if name == "hrvmamba_base" else 256)


def test_official_norms_have_an_epsilon_of_1e5():
    model = create("hrvmamba_nano")
    norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert {m.eps for m in norms} == {1e-5} and {type(m) for m in norms} >= {nn.LayerNorm}


@pytest.mark.parametrize("name", ["hrvmamba_nano", "hrvmamba_small"])
def test_own_names_pass_the_conversion_unchanged(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    own = model.convert_official(meta_state(name))
    assert {key for key in model.state_dict() if not key.endswith("num_batches_tracked")} == own.keys()
    assert model.convert_official(own).keys() == own.keys()


def test_stochastic_depth_grows_over_the_blocks_of_a_branch_and_is_the_same_in_all_branches():
    model = create("hrvmamba_small", depths=(2, 1, 3), units=(1, 2, 1), drop_path_rate=0.6)
    rates = [
        [[getattr(block.drop_path, "drop_prob", 0.0) for block in branch.blocks] for branch in unit.branches]
        for stage in model.stages[1:]
        for unit in stage.units
    ]
    wanted = [[0.0, 0.1], [0.2], [0.3], [0.4, 0.5, 0.6]]
    assert [len(unit) for unit in rates] == [2, 3, 3, 4]
    for unit, want in zip(rates, wanted, strict=True):
        for branch in unit:
            assert branch == pytest.approx(want)


def test_a_positional_convolution_reaches_the_local_convolutions_but_not_the_residual():
    torch.manual_seed(0)
    block = DVSSBlock(8, nn.Identity(), mlp_ratio=2.0, drop_path=0.0, position=True).eval()
    for part in (block.local.convs, [block.mlp.fc2, block.cpe2]):
        for layer in part:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    block.norm1 = nn.Sequential(block.norm1, nn.Threshold(torch.inf, 0.0))
    x = torch.randn(1, 4, 5, 8)
    torch.testing.assert_close(block(x), x)


def test_neighbouring_channels_of_the_local_convolutions_come_from_different_kernels():
    layer, x = ESInB(8), torch.randn(1, 9, 9, 8, requires_grad=True)
    sizes = []
    for channel in range(8):
        (gradient,) = torch.autograd.grad(layer(x)[0, 4, 4, channel], x)
        rows, columns, seen = gradient[0].nonzero(as_tuple=True)
        sizes.append(int(rows.max() - rows.min() + 1))
        assert (
            set(seen.tolist()) == {channel // 4 + 2 * (channel % 4)} and columns.max() - columns.min() + 1 == sizes[-1]
        )
    assert sizes == [3, 5, 7, 9, 3, 5, 7, 9]


def test_linear_layers_start_as_a_truncated_normal_and_the_necks_convolutions_by_fan_out():
    torch.manual_seed(0)
    model = create("hrvmamba_small", neck_dims=(16, 32, 64, 128), num_features=256)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert layer.bias is None or not layer.bias.any()
    assert model.neck.downsample[2].conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.05)
    assert model.neck.final.conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": (1, 1)}, r"got \(16, 24, 32, 48\), \(16, 24, 32, 48\), \(1, 1\) and \(1, 1, 1\)"),
        ({"depths": (1,)}, r"units and depths one less, got .* \(1, 1, 1\) and \(1,\)"),
        ({"neck_dims": (8, 8)}, r"neck_dims need one entry per branch"),
        ({"dims": (16, 24, 32, 50)}, "divisible by 4, the number of kernel sizes, got 50"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HRVMamba(**{**family("hrvmamba_nano").small, **change})


@pytest.mark.parametrize("name", BRANCHES)
def test_levels_are_the_branches_of_the_last_stage(name):
    model, x = create(name), images(1, 3, 64, 96)
    seen = []
    model.stages[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    final, maps = model.forward_intermediates(x)
    for got, want in zip(maps, seen[0], strict=True):
        assert torch.equal(got, want)
    assert torch.equal(final, model.neck(maps))
    early, chosen = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(early, maps[1]) and len(chosen) == 2


@pytest.mark.parametrize("name", BRANCHES)
def test_pruning_removes_neck_classifier_and_exchanges_below_the_chosen_level(name):
    model, x = create(name), images(2, 3, 64, 96)
    want = model.forward_intermediates(x, intermediates_only=True)[1]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages[-1].units[-1].fusion) == 2 and model.num_features == family(name).dims[1]
    assert torch.equal(model(x), want)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    model.train()(x).sum().backward()
    idle = {key.rsplit(".fusion.")[0] for key, p in model.named_parameters() if p.grad is None}
    # The level above the chosen one is still there, since levels are counted from it.
    assert idle == {f"stages.3.units.{len(model.stages[-1].units) - 1}"}


@pytest.mark.parametrize("name", BRANCHES)
def test_pruning_without_the_head_keeps_everything(name):
    model, x = create(name), images(1, 3, 64, 64)
    want = model(x)
    assert model.prune_intermediate_layers([0, 2], prune_norm=True, prune_head=False) == [0, 2]
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", BRANCHES)
def test_layer_decay_gives_earlier_blocks_smaller_rates_and_branches_the_same(name):
    model = create(name, depths=(2, 2, 2))
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    path = [model.stem, *model.stages[0].blocks]
    for stage in model.stages[1:]:
        path += [stage.transition[-1], *stage.units[0].branches[0].blocks]
        last = next(path[-1].parameters())
        assert {scale[id(p)] for p in stage.units[0].fusion.parameters()} == {scale[id(last)]}
        for branch in stage.units[0].branches[1:]:
            for block, first in zip(branch.blocks, stage.units[0].branches[0].blocks, strict=True):
                assert {scale[id(p)] for p in block.parameters()} == {scale[id(p)] for p in first.parameters()}
    scales = []
    for part in (*path, model.neck, model.head.fc):
        (only,) = {scale[id(p)] for p in part.parameters()}
        scales.append(only)
    assert scales == sorted(set(scales)) and scales[-1] == 1.0


def test_coarse_groups_are_stem_stages_neck_and_head():
    model = create("hrvmamba_nano")
    numbers = {"stem": 0, "stages.0": 1, "stages.1": 2, "stages.2": 3, "stages.3": 4, "neck": 5, "head": 6}
    for key, group in group_parameters(model, model.group_matcher(coarse=True), reverse=True).items():
        first, second = key.split(".")[:2]
        assert group == numbers[f"stages.{second}" if first == "stages" else first]
