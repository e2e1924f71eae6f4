"""SegMamba: official outputs, shapes in 2-D and 3-D, slices, refused arguments and inputs, training, precision."""

import copy
import pickle
from pathlib import Path

import parity
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch.nn.functional import cross_entropy
from training import losses_of_training

from vssm.checkpoint import load_official
from vssm.networks import SegMamba

GOLDEN = Path(__file__).parents[1] / "golden"
OFFICIAL_SLICES = (64, 32, 16, 8)


def small(**overrides):
    arguments = dict(in_channels=1, out_channels=3, depths=(1, 2), features=(4, 6), hidden_size=8)
    torch.manual_seed(0)
    return SegMamba(**arguments | overrides)


def small_networks(**overrides):
    for spatial_dims, size in ((2, (8, 12)), (3, (8, 4, 8))):
        network = small(spatial_dims=spatial_dims, **overrides)
        yield network, torch.randn(2, 1, *size)


def official(name):
    golden = parity.load(GOLDEN / f"{name}.json")
    network = SegMamba(4, 4, num_slices=OFFICIAL_SLICES).eval()
    return golden, network, {key: torch.from_numpy(value) for key, value in parity.fill_state(golden["state"]).items()}


def record_taps(network, outputs):
    """Writes the output of every part that the golden files name into `outputs`."""

    def record(module, tap, view=lambda out: out):
        module.register_forward_hook(lambda _module, _inputs, out: outputs.update({tap: view(out.detach().clone())}))

    record(network.stages[0].blocks[0].mixer, "mamba0", lambda out: out.flatten(1, -2))
    for s, stage in enumerate(network.stages):
        for module, tap in ((stage.gsc, "gsc"), (stage, "stage"), (stage.mlp, "feat")):
            record(module, f"{tap}{s}")
    record(network.encoders[0], "encoder1")
    record(network.encoders[-1], "encoder5")
    record(network.refine, "decoder1")
    for s, block in enumerate(network.decoders):
        record(block, f"decoder{s + 2}")


@pytest.mark.parametrize("name", ["segmamba", "segmamba_d64"])
def test_official_weights_give_the_official_output_at_every_stage(name):
    golden, network, state = official(name)
    assert sum(p.numel() for p in network.parameters()) == golden["params"]
    load_official(network, state)
    outputs = {}
    record_taps(network, outputs)
    with torch.no_grad():
        outputs["out"] = network(torch.from_numpy(parity.fill_input(golden["input"])))
    assert outputs.keys() == golden["outputs"].keys()
    for tap, want in golden["outputs"].items():
        error = parity.relative_error(outputs[tap].numpy(), want)
        assert error < 1e-4, f"{tap}: {error:.2g}"


def test_official_weights_of_another_network_are_refused():
    state = {key: torch.zeros(shape) for key, shape in parity.load(GOLDEN / "segmamba.json")["state"]}
    with pytest.raises(ValueError, match=r"encoders\.0\.layer\.conv1\.conv\.weight"):
        load_official(SegMamba(1, 4), state)
    del state["vit.stages.1.0.mamba.D_s"]
    with pytest.raises(ValueError, match=r"stages\.1\.blocks\.0\.mixer\.scan\.Ds .* is missing"):
        load_official(SegMamba(4, 4), state)


# Arguments of `small`, image size in 3-D (in 2-D the first axis is left out).
SHAPES = [
    (dict(), (4, 8, 12)),
    (dict(in_channels=3, out_channels=1), (8, 8, 4)),
    (dict(depths=(1,), features=(5,), hidden_size=3), (2, 6, 2)),
    (dict(depths=(1, 1, 1), features=(4, 4, 16), hidden_size=4), (8, 8, 16)),
    (dict(depths=(1, 1, 1, 1), features=(4, 8, 16, 32), hidden_size=64), (16, 32, 16)),
    (dict(num_slices=(4, 2)), (12, 8, 4)),
]


@pytest.mark.parametrize("arguments, size", SHAPES)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_logits_have_the_size_of_the_image(spatial_dims, arguments, size):
    size = size[-spatial_dims:]
    network = small(spatial_dims=spatial_dims, **arguments).eval()
    with torch.no_grad():
        out = network(torch.randn(2, arguments.get("in_channels", 1), *size))
    assert out.shape == (2, arguments.get("out_channels", 3), *size)


def test_slices_follow_the_volume_unless_they_are_given():
    x = torch.randn(1, 1, 16, 8, 8)
    with torch.no_grad():
        free = small().eval()(x)
        # Stages of 8 and 4 slices.
        assert torch.equal(small(num_slices=(8, 4)).eval()(x), free)
        assert not torch.allclose(small(num_slices=(4, 2)).eval()(x), free, atol=1e-5)


def test_the_defaults_are_the_published_network():
    network = SegMamba(4, 4)
    want = parity.load(GOLDEN / "segmamba.json")["params"]
    assert sum(p.numel() for p in network.parameters()) == want
    assert network.num_slices is None


def test_every_parameter_gets_a_gradient():
    for network, x in small_networks():
        (network(x) * torch.randn(2, 3, *x.shape[2:])).sum().backward()
        unmoved = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert unmoved == []


def test_training_lowers_the_loss():
    for network, x in small_networks():
        target = (x[:, 0] > 0).long()
        losses = losses_of_training(network, x, target, cross_entropy)
        assert losses[-1] < 0.7 * losses[0]


def test_an_image_gives_the_same_logits_alone_and_in_a_batch():
    for network, x in small_networks():
        network, x = network.double().eval(), x.double()
        with torch.no_grad():
            assert torch.allclose(network(x)[1:], network(x[1:]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_stays_finite_and_close(dtype):
    for network, x in small_networks():
        network.eval()
        with torch.no_grad():
            want = network(x)
            with torch.autocast("cpu", dtype=dtype):
                out = network(x)
        assert torch.isfinite(out).all()
        # Instance norm over the few voxels of the deepest maps amplifies the rounding of the convolutions.
        assert (out - want).norm() < 0.2 * want.norm()


def test_copies_and_state_dicts_give_the_same_logits():
    for network, x in small_networks():
        network.eval()
        other = small(spatial_dims=x.ndim - 2).eval()
        torch.nn.init.zeros_(other.head.weight)
        load_official(other, network.state_dict())
        with torch.no_grad():
            want = network(x)
            assert torch.equal(other(x), want)
            assert torch.equal(copy.deepcopy(network)(x), want)
            assert torch.equal(pickle.loads(pickle.dumps(network))(x), want)


def test_compiles_without_graph_breaks_and_exports():
    for network, x in small_networks():
        network.eval()
        with torch.no_grad():
            want = network(x)
            compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
            assert torch.allclose(compiled(x), want, atol=1e-5)
            assert torch.allclose(torch.export.export(network, (x,)).module()(x), want, atol=1e-5)


def test_monai_runs_it_over_windows_of_a_meta_tensor():
    network = small().eval()
    image = MetaTensor(torch.randn(1, 1, 12, 9, 20))
    with torch.no_grad():
        out = SlidingWindowInferer(roi_size=(8, 8, 8), overlap=0.25)(image, network)
    assert isinstance(out, MetaTensor) and out.shape == (1, 3, 12, 9, 20)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(spatial_dims=1), "spatial_dims is 1"),
        (dict(in_channels=0), "in_channels holds 0"),
        (dict(out_channels=0), "out_channels holds 0"),
        (dict(hidden_size=0), "hidden_size holds 0"),
        (dict(features=(), depths=()), "features is empty"),
        (dict(features=(4, -1)), "features holds -1"),
        (dict(depths=(1, 0)), "depths holds 0"),
        (dict(depths=(1, 1, 1)), "depths has 3 entries; 2 are needed"),
        (dict(num_slices=(4,)), "num_slices has 1 entries; 2 are needed"),
        (dict(num_slices=(4, 0)), "num_slices holds 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(overrides, words):
    with pytest.raises(ValueError, match=words):
        small(**overrides)


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 1, 8, 8), "3 spatial axes"),
        ((1, 1, 8, 8, 8, 8), "3 spatial axes"),
        ((1, 2, 8, 8, 8), "1 channels"),
        ((0, 1, 8, 8, 8), "the batch is empty"),
        ((1, 1, 9, 16, 15), r"divisible by \(4, 4, 4\).* got \(9, 16, 15\); pad to \(12, 16, 16\)"),
        ((1, 1, 4, 4, 4), r"got \(4, 4, 4\); pad to \(4, 4, 8\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_what_fits(shape, words):
    with pytest.raises(ValueError, match=words):
        small()(torch.randn(shape))


def test_slices_that_do_not_fit_are_refused_with_a_size_that_fits():
    network = small(num_slices=(8, 8)).eval()
    with pytest.raises(ValueError, match=r"\(4, 4, 8\) cannot be cut .* pad to \(16, 4, 8\)"):
        network(torch.randn(1, 1, 4, 4, 8))
    assert network(torch.randn(1, 1, 16, 4, 8)).shape == (1, 3, 16, 4, 8)
