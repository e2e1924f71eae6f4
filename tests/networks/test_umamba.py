"""U-Mamba: official outputs, shapes in 2-D and 3-D, refused arguments and inputs, precision, compilation."""

import copy
import re
from pathlib import Path

import parity
import pytest
import torch
from torch.nn.functional import cross_entropy
from training import losses_of_training

from vssm.checkpoint import load_official
from vssm.layers.mamba import Mamba
from vssm.layers.ssd import Mamba2, NonCausalSSD
from vssm.networks import UMambaBot, UMambaEnc
from vssm.networks.umamba import MambaLayer

GOLDEN = Path(__file__).parents[1] / "golden"
# The float32 floor of the encoder variant is higher: its official outputs change 300 times as much as its weights.
PARITY = {"umamba_bot_2d": 1e-4, "umamba_bot_3d": 1e-4, "umamba_enc_2d": 1e-3, "umamba_enc_3d_anisotropic": 1e-3}
VARIANTS = {"umamba_bot": UMambaBot, "umamba_enc": UMambaEnc}


def small(variant, spatial_dims, **overrides):
    """Three stages, reduced by 2 and by 2; the encoder variant is built for 8 voxels per axis."""
    arguments = dict(
        in_channels=1,
        out_channels=3,
        features=(4, 8, 16),
        strides=(1, 2, 2),
        kernel_sizes=(3, 3, 3),
        num_blocks=(1, 2, 1),
        num_decoder_blocks=(1, 1),
    )
    if variant is UMambaEnc:
        arguments["img_size"] = 8
    return variant(spatial_dims, **arguments | overrides)


def every_mixer():
    for mixer in ("mamba", "ssd", "nc_ssd", "none"):
        yield from every_small_network(mixer=mixer)


def every_small_network(**overrides):
    for variant in VARIANTS.values():
        for spatial_dims in (2, 3):
            torch.manual_seed(0)
            yield small(variant, spatial_dims, **overrides), torch.randn(2, 1, *[8] * spatial_dims)


def official(name, deep_supervision=False, **overrides):
    """The golden record, the network of its plans and the official state dict, every tensor once."""
    golden = parity.load(GOLDEN / f"{name}.json")
    run = golden["source"]["kwargs"]
    state = {key: torch.from_numpy(value) for key, value in parity.fill_state(golden["state"]).items()}
    arguments = (run["plans"], run["num_input_channels"], run["num_classes"])
    network = VARIANTS[name[:10]].from_plans(*arguments, deep_supervision=deep_supervision, **overrides)
    return golden, network.eval(), state


def with_repetitions(state):
    """`state` as official files hold it: convolutions and norms of a block twice, the encoder again in the decoder."""
    numbers = {"conv": "0", "norm": "1"}
    blocks = {
        re.sub(r"(\.conv[12])\.(conv|norm)\.", lambda m: f"{m[1]}.all_modules.{numbers[m[2]]}.", key): value
        for key, value in state.items()
    }
    state = state | blocks
    return state | {f"decoder.{key}": value for key, value in state.items() if key.startswith("encoder.")}


def record_taps(network, outputs):
    """Writes the output of every part that the golden files name into `outputs`."""

    def record(module, tap):
        module.register_forward_hook(lambda _module, _inputs, out: outputs.update({tap: out.detach().clone()}))

    record(network.stem, "stem")
    for i, stage in enumerate(network.stages):
        record(stage.blocks, f"conv{i}")
        record(stage.mamba, f"stage{i}")
    record(network.stages[-1].mamba, "bottleneck")
    for i, stage in enumerate(network.decoder):
        record(stage, f"dec{i}")


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("name", PARITY)
def test_official_weights_give_the_official_output_at_every_stage(name, deep_supervision):
    golden, network, state = official(name, deep_supervision=deep_supervision)
    load_official(network, state)
    outputs = {}
    record_taps(network, outputs)
    with torch.no_grad():
        logits = network(torch.from_numpy(parity.fill_input(golden["input"])))
    outputs |= {f"ds{i}": x for i, x in enumerate(logits)} if deep_supervision else {"out": logits}
    unseen = {"out"} if deep_supervision else {tap for tap in golden["outputs"] if tap.startswith("ds")}
    for tap in golden["outputs"].keys() - unseen:
        error = parity.relative_error(outputs[tap].numpy(), golden["outputs"][tap])
        assert error < PARITY[name], f"{tap}: {error:.2g}"


@pytest.mark.parametrize("name", PARITY)
def test_parameters_are_as_many_as_the_official_ones(name):
    golden, network, _ = official(name, deep_supervision=True)
    assert sum(p.numel() for p in network.parameters()) == golden["params"]


@pytest.mark.parametrize("name", PARITY)
def test_official_files_that_repeat_tensors_load_and_contradictions_are_refused(name):
    golden, network, state = official(name)
    load_official(network, state)
    once = copy.deepcopy(network.state_dict())
    state = with_repetitions(state)
    assert len(state) == len(golden["state"]) + golden["tied"]["aliases"]
    network = official(name)[1]
    load_official(network, state)
    assert all(torch.equal(value, once[key]) for key, value in network.state_dict().items())

    key = "decoder.encoder.stages.0.0.conv1.weight"
    with pytest.raises(ValueError, match="tensors differ"):
        load_official(network, state | {key: state[key] + 1})


def test_official_weights_do_not_load_into_another_network():
    _, control, state = official("umamba_bot_2d", mixer="none")
    with pytest.raises(ValueError, match=r"stages\.4\.mamba"):
        load_official(control, state)
    _, _, state = official("umamba_enc_2d")
    other = parity.load(GOLDEN / "umamba_enc_2d.json")["source"]["kwargs"]["plans"] | {"patch_size": [96, 96]}
    with pytest.raises(ValueError, match=r"stages\.5\.mamba\.norm\.weight"):
        load_official(UMambaEnc.from_plans(other, 3, 4), state)


def test_weights_trained_with_deep_supervision_load_without_it():
    for variant in VARIANTS.values():
        trained, alone = small(variant, 2, deep_supervision=True), small(variant, 2)
        load_official(alone, trained.state_dict())
        trained.deep_supervision = False
        x = torch.randn(1, 1, 8, 8)
        assert torch.equal(alone(x), trained(x))


def test_plans_keep_their_blocks_in_the_first_half_only():
    plans = parity.load(GOLDEN / "umamba_enc_2d.json")["source"]["kwargs"]["plans"]
    network = UMambaEnc.from_plans(plans | {"n_conv_per_stage_encoder": [1, 3, 4, 6, 6, 6]}, 1, 2)
    assert [len(stage.blocks) for stage in network.stages] == [1, 3, 4, 1, 1, 1]
    assert [len(stage.blocks) for stage in network.decoder] == [2, 2, 2, 1, 1]


def test_plans_without_a_needed_key_are_refused_by_its_name():
    plans = dict(parity.load(GOLDEN / "umamba_enc_2d.json")["source"]["kwargs"]["plans"])
    del plans["patch_size"]
    UMambaBot.from_plans(plans, 1, 2)
    with pytest.raises(ValueError, match="patch_size"):
        UMambaEnc.from_plans(plans, 1, 2)


def as_later_plans_have_it(plans, blocks="n_conv_per_stage", **overrides):
    """`plans` in the words of nnU-Net since "architecture" holds the network's arguments."""
    depth = len(plans["conv_kernel_sizes"])
    arguments = {
        "n_stages": depth,
        "features_per_stage": [
            min(plans["UNet_base_num_features"] * 2**s, plans["unet_max_num_features"]) for s in range(depth)
        ],
        "kernel_sizes": plans["conv_kernel_sizes"],
        "strides": plans["pool_op_kernel_sizes"],
        blocks: plans["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": plans["n_conv_per_stage_decoder"],
    }
    return {"patch_size": plans["patch_size"], "architecture": {"arch_kwargs": arguments | overrides}}


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("blocks", ["n_conv_per_stage", "n_blocks_per_stage"])
def test_plans_of_later_versions_make_the_same_network(name, blocks):
    plans = parity.load(GOLDEN / f"{name}.json")["source"]["kwargs"]["plans"]
    variant = VARIANTS[name[:10]]
    early, later = (variant.from_plans(p, 1, 2) for p in (plans, as_later_plans_have_it(plans, blocks)))
    assert str(early) == str(later)


def test_later_plans_that_do_not_fit_are_refused():
    plans = parity.load(GOLDEN / "umamba_bot_2d.json")["source"]["kwargs"]["plans"]
    with pytest.raises(ValueError, match=r"features_per_stage is \[8, 12, 16\]"):
        UMambaBot.from_plans(as_later_plans_have_it(plans, features_per_stage=[8, 12, 16]), 1, 2)
    lacking = as_later_plans_have_it(plans)
    del lacking["architecture"]["arch_kwargs"]["strides"]
    with pytest.raises(ValueError, match="lacks pool_op_kernel_sizes"):
        UMambaBot.from_plans(lacking, 1, 2)


# Arguments of `small` and image sizes, written for 3-D; in 2-D the first axis is left out.
SHAPES = [
    (dict(), (8, 32, 16)),
    (dict(in_channels=2, out_channels=1), (8, 16, 8)),
    (dict(mixer="none"), (8, 32, 16)),
    (dict(mixer="ssd"), (8, 16, 8)),
    (dict(mixer="nc_ssd"), (8, 16, 8)),
    (dict(mixer_stages=(0, 2)), (8, 16, 8)),
    (dict(strides=(1, (1, 2, 2), (2, 1, 2)), kernel_sizes=((1, 3, 3), 5, 1)), (2, 6, 12)),
    (
        dict(features=(4, 8), strides=(1, 4), kernel_sizes=(3, 3), num_blocks=(2, 2), num_decoder_blocks=(3,)),
        (4, 8, 12),
    ),
]


@pytest.mark.parametrize("arguments, size", SHAPES)
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS.values())
def test_logits_have_the_size_of_the_image(variant, spatial_dims, arguments, size):
    size = size[-spatial_dims:]
    for key in ("strides", "kernel_sizes"):
        if key in arguments:
            axes = [value if isinstance(value, int) else value[-spatial_dims:] for value in arguments[key]]
            arguments = arguments | {key: axes}
    if variant is UMambaEnc:
        arguments = arguments | {"img_size": size}
    network = small(variant, spatial_dims, **arguments).eval()
    with torch.no_grad():
        out = network(torch.randn(2, arguments.get("in_channels", 1), *size))
    assert out.shape == (2, arguments.get("out_channels", 3), *size)


def test_other_sizes_fit_where_no_stage_has_channel_tokens():
    network = small(UMambaEnc, 2, img_size=(32, 32)).eval()
    for size in ((32, 32), (16, 48), (8, 4)):
        assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("training", [True, False])
def test_deep_supervision_lists_every_resolution_highest_first(training):
    for network, x in every_small_network(deep_supervision=True):
        sizes = [tuple(logits.shape[1:]) for logits in network.train(training)(x)]
        dims = x.ndim - 2
        assert sizes == [(3, *[8] * dims), (3, *[4] * dims)]


def test_mamba_layers_stand_where_they_were_published():
    def stages(network):
        return [s for s, stage in enumerate(network.stages) if not isinstance(stage.mamba, torch.nn.Identity)]

    common = dict(
        features=[4] * 4, strides=[1, 2, 2, 2], kernel_sizes=[3] * 4, num_blocks=[1] * 4, num_decoder_blocks=[1] * 3
    )
    for spatial_dims in (2, 3):
        assert stages(UMambaBot(spatial_dims, 1, 2, **common)) == [3]
    assert stages(UMambaEnc(3, 1, 2, img_size=32, **common)) == [0, 1, 2, 3]
    assert stages(UMambaEnc(2, 1, 2, img_size=32, **common)) == [1, 3]
    assert stages(small(UMambaEnc, 2)) == [0, 2]


def test_the_control_differs_by_the_mamba_layers_alone():
    for variant in VARIANTS.values():
        for spatial_dims in (2, 3):
            full, control = (small(variant, spatial_dims, **o).state_dict() for o in ({}, {"mixer": "none"}))
            rest = {key: value.shape for key, value in full.items() if ".mamba." not in key}
            assert len(rest) < len(full)
            assert rest == {key: value.shape for key, value in control.items()}


def test_mixers_change_nothing_but_themselves():
    for variant in VARIANTS.values():
        networks = {name: small(variant, 3, mixer=name) for name in ("mamba", "ssd", "nc_ssd")}
        kinds = {"mamba": Mamba, "ssd": Mamba2, "nc_ssd": NonCausalSSD}
        rest = []
        for name, network in networks.items():
            mixers = [stage.mamba.mixer for stage in network.stages if isinstance(stage.mamba, MambaLayer)]
            assert mixers and {type(mixer) for mixer in mixers} == {kinds[name]}
            state = network.state_dict().items()
            rest.append({key: value.shape for key, value in state if ".mixer." not in key})
        assert rest[0] == rest[1] == rest[2]
        # As many states per channel in each: A of Mamba, and what ssd and nc_ssd keep.
        assert networks["mamba"].stages[-1].mamba.mixer.A_log.shape[1] == 16
        assert {networks[name].stages[-1].mamba.mixer.d_state for name in ("ssd", "nc_ssd")} == {16}


def test_the_control_takes_every_size_that_the_strides_allow():
    control = small(UMambaEnc, 2, mixer="none").eval()
    assert control(torch.randn(1, 1, 16, 24)).shape == (1, 3, 16, 24)


def test_the_skip_of_the_highest_resolution_is_left_out_in_2d_only():
    for network, _ in every_small_network():
        joined = network.decoder[-1].blocks[0].conv1.in_channels
        assert joined == (4 if network.shape.spatial_dims == 2 else 8)


def test_convolutions_start_from_kaiming_and_mamba_from_its_own_initialisation():
    torch.manual_seed(0)
    network = small(UMambaBot, 3, features=(4, 8, 64))
    weight = network.stages[2].blocks[0].conv2.weight
    assert abs(weight.std() - (2 / (1 + 0.01**2) / (64 * 27)) ** 0.5) < 1e-3
    assert not network.heads[0].bias.any()
    assert network.stages[2].mamba.mixer.conv1d.bias.any()


def test_every_parameter_gets_a_gradient():
    for deep_supervision in (False, True):
        for network, x in every_small_network(deep_supervision=deep_supervision):
            logits = network(x)
            sum(y.square().sum() for y in (logits if deep_supervision else [logits])).backward()
            assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_every_parameter_of_every_mixer_gets_a_gradient():
    for network, x in every_mixer():
        network(x).square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_training_lowers_the_loss_with_every_mixer():
    for network, x in every_mixer():
        target = (x[:, 0] > 0).long()
        losses = losses_of_training(network, x, target, cross_entropy)
        assert losses[-1] < 0.7 * losses[0]


def test_bfloat16_autocast_stays_finite_and_close():
    for network, x in every_mixer():
        network.eval()
        with torch.no_grad():
            wanted = network(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = network(x)
        assert torch.isfinite(out).all()
        # Instance norm over the few voxels of the deepest maps amplifies the rounding of the convolutions.
        assert (out - wanted).norm() < 0.2 * wanted.norm()


def test_mamba_layers_run_in_float32_under_autocast():
    network, seen = small(UMambaBot, 2), []
    network.stages[-1].mamba.register_forward_hook(
        lambda _module, inputs, out: seen.append((inputs[0].dtype, out.dtype))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(torch.randn(1, 1, 8, 8))
    assert seen == [(torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("variant, spatial_dims", [(UMambaBot, 3), (UMambaEnc, 2)])
def test_compiles_without_graph_breaks(variant, spatial_dims):
    network, x = small(variant, spatial_dims).eval(), torch.randn(2, 1, *[8] * spatial_dims)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), network(x), atol=1e-5)


def test_exports_with_the_same_logits():
    for network, x in every_mixer():
        network.eval()
        exported = torch.export.export(network, (x,)).module()
        with torch.no_grad():
            assert torch.allclose(exported(x), network(x), atol=1e-5)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(spatial_dims=1), "spatial_dims is 1"),
        (dict(in_channels=0), "in_channels holds 0"),
        (dict(out_channels=0), "out_channels holds 0"),
        (dict(features=(4,)), "at least two stages"),
        (dict(features=(4, 8, -1)), "features holds -1"),
        (dict(strides=(1, 2)), "strides has 2 entries; 3 are needed"),
        (dict(strides=(1, 2, (2, 2, 2, 2))), r"strides holds \(2, 2, 2, 2\)"),
        (dict(strides=(1, 2, 0)), "strides holds 0"),
        (dict(kernel_sizes=(3, 3, 3, 3)), "kernel_sizes has 4 entries; 3 are needed"),
        (dict(kernel_sizes=(3, 3, 2)), "kernel_sizes .* odd"),
        (dict(num_blocks=(1, 1)), "num_blocks has 2 entries; 3 are needed"),
        (dict(num_blocks=(1, 0, 1)), "num_blocks holds 0"),
        (dict(num_decoder_blocks=(1, 1, 1)), "num_decoder_blocks has 3 entries; 2 are needed"),
        (dict(mixer_stages=(3,)), r"mixer_stages is \(3,\); it must name some of the stages 0 to 2"),
        (dict(mixer_stages=()), r"mixer_stages is \(\).*mixer='none' leaves the mixers out"),
        (dict(mixer="mamba2"), r"mixer is 'mamba2'; it must be one of mamba, ssd, nc_ssd, none"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS.values())
def test_arguments_that_do_not_fit_are_refused_by_name(variant, overrides, words):
    with pytest.raises(ValueError, match=words):
        small(variant, **{"spatial_dims": 3} | overrides)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"the batch is empty, shape \(0, 1, 8, 8\)"):
        small(UMambaBot, 2)(torch.empty(0, 1, 8, 8))


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="img_size"):
        small(UMambaBot, 2, img_size=8)


def test_an_img_size_that_the_strides_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"divisible by \(4, 4\).* got \(30, 32\); pad to \(32, 32\)"):
        small(UMambaEnc, 2, img_size=(30, 32))
    with pytest.raises(ValueError, match="img_size holds"):
        small(UMambaEnc, 2, img_size=(32, 32, 32))


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 1, 8, 8), "3 spatial axes"),
        ((1, 1, 8, 8, 8, 8), "3 spatial axes"),
        ((1, 2, 8, 8, 8), "1 channels"),
        ((1, 1, 9, 16, 15), r"got \(9, 16, 15\); pad to \(12, 16, 16\)"),
        ((1, 1, 4, 4, 4), r"got \(4, 4, 4\); pad to \(4, 4, 8\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_what_fits(shape, words):
    with pytest.raises(ValueError, match=words):
        small(UMambaBot, 3)(torch.randn(shape))


def test_channel_tokens_refuse_any_size_but_img_size():
    network = small(UMambaEnc, 3)
    assert network.channel_token_stages == (2,)
    with pytest.raises(ValueError, match=r"built for img_size \(8, 8, 8\), got \(16, 8, 8\)"):
        network(torch.randn(1, 1, 16, 8, 8))
