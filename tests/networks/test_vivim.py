"""Vivim: official outputs, shapes, pretrained SegFormers, refused arguments and inputs, training, precision."""

import copy
import pickle
import sys
from pathlib import Path

import parity
import pytest
import torch
from torch.nn.functional import avg_pool3d, binary_cross_entropy_with_logits
from training import losses_of_training
from transformers import SegformerConfig, SegformerModel

from vssm.checkpoint import load_official
from vssm.networks import Vivim

GOLDEN = Path(__file__).parents[1] / "golden" / "vivim.json"
SIZES = dict(depths=(1, 1, 2, 1), features=(4, 8, 8, 12), num_heads=(1, 2, 2, 3))


def small(**overrides):
    arguments = dict(in_channels=2, out_channels=3, mamba_depths=(1, 2, 1, 1), hidden_size=16) | SIZES
    torch.manual_seed(0)
    return Vivim(**arguments | overrides)


def video(batch=2, frames=3, size=(32, 40)):
    return torch.randn(batch, frames, 2, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def official_run():
    """The golden record and, by tap, the outputs of the published network with the official weights."""
    golden = parity.load(GOLDEN)
    network = Vivim(3, 1, edge=True).eval()
    load_official(network, {key: torch.from_numpy(value) for key, value in parity.fill_state(golden["state"]).items()})
    outputs, x = {}, torch.from_numpy(parity.fill_input(golden["input"]))
    size = (x.shape[0], x.shape[1])

    def record(module, tap, view):
        module.register_forward_hook(lambda _module, _inputs, out: outputs.update({tap: view(out.detach().clone())}))

    def as_video(frames):
        return frames.unflatten(0, size).transpose(1, 2)

    for s, (stage, blocks) in enumerate(zip(network.segformer.stages, network.temporal, strict=True)):
        record(stage, f"in{s}", as_video)
        record(blocks[-1], f"stage{s}", lambda out: out.movedim(-1, 1))
    record(network.temporal[0][0].mixer, "mamba0", lambda out: out.flatten(1, -2))
    network.decoder.norm.register_forward_pre_hook(lambda _module, inputs: outputs.update(fuse=inputs[0].clone()))
    record(network.head, "logits_low", lambda logits: logits)
    with torch.no_grad():
        out, edge = network(x)
    outputs |= {"out": out.flatten(0, 1), "edge": edge.flatten(0, 1)}
    return golden, network, outputs


def test_official_weights_give_the_official_output_at_every_stage(official_run):
    golden, _, outputs = official_run
    assert outputs.keys() == golden["outputs"].keys()
    for tap, want in golden["outputs"].items():
        error = parity.relative_error(outputs[tap].numpy(), want)
        assert error < 1e-4, f"{tap}: {error:.2g}"


def test_parameters_are_the_official_ones_but_those_it_does_not_use(official_run):
    golden, network, _ = official_run
    unused = ("encoder.downsample_layers.layer_norm.", "decoder.classifier.")
    count = sum(torch.Size(shape).numel() for key, shape in golden["state"] if key.startswith(unused))
    assert sum(p.numel() for p in network.parameters()) == golden["params"] - count


def test_official_weights_load_without_the_edge_head_and_not_into_other_sizes():
    state = {key: torch.zeros(shape) for key, shape in parity.load(GOLDEN)["state"]}
    load_official(Vivim(3, 1), state)
    with pytest.raises(ValueError, match=r"head\.weight has shape \(1, 768, 1, 1\), the model needs \(2, 768, 1, 1\)"):
        load_official(Vivim(3, 2), state)


@pytest.mark.parametrize(
    "arguments, batch, frames, size",
    [
        ({}, 2, 3, (32, 40)),
        ({}, 1, 1, (45, 33)),
        (dict(in_channels=2, out_channels=1), 1, 5, (64, 32)),
        (dict(mamba_depths=(1, 1, 1, 1), depths=(1, 1, 1, 1), hidden_size=5), 3, 2, (32, 32)),
    ],
)
def test_every_frame_gets_logits_of_its_size(arguments, batch, frames, size):
    network = small(**arguments).eval()
    x, classes = video(batch, frames, size), arguments.get("out_channels", 3)
    with torch.no_grad():
        assert network(x).shape == (batch, frames, classes, *size)
        out, edge = small(**arguments, edge=True).eval()(x)
    assert out.shape == (batch, frames, classes, *size) and edge.shape == (batch, frames, 1, *size)


def test_frames_see_each_other_and_videos_do_not():
    network, x = small().double().eval(), video().double()
    with torch.no_grad():
        out = network(x)
        assert torch.allclose(network(x[1:]), out[1:], rtol=1e-10, atol=1e-10)
        x[0, -1] += 1.0
        changed = network(x)
    assert (changed[0, 0] - out[0, 0]).abs().max() > 1e-6
    assert torch.allclose(changed[1], out[1], rtol=1e-10, atol=1e-10)


def test_a_pretrained_segformer_gives_its_weights():
    def pretrained(**sizes):
        return SegformerModel(SegformerConfig(num_channels=2, **sizes))

    network, sizes = small(), dict(hidden_sizes=[4, 8, 8, 12], num_attention_heads=[1, 2, 2, 3])
    segformer = pretrained(depths=[1, 1, 2, 1], **sizes)
    network.load_segformer(segformer)
    weights = segformer.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in network.segformer.state_dict().items())
    with pytest.raises(ValueError, match=r"stages\.2\.blocks\.2\..* is not in the model"):
        network.load_segformer(pretrained(depths=[1, 1, 3, 1], **sizes))


def test_every_parameter_gets_a_gradient():
    network = small(edge=True, drop_path_rate=0.0)
    # Large enough that attention has more than one key to choose from at every stage.
    out, edge = network(video(batch=1, frames=2, size=(64, 64)))
    ((out * torch.randn_like(out)).sum() + (edge * torch.randn_like(edge)).sum()).backward()
    # A key's bias shifts all scores of a query alike, which softmax takes out again.
    unmoved = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert [name for name in unmoved if not name.endswith("k_proj.bias")] == []
    assert all(p.grad is not None for p in network.parameters())


def test_training_lowers_the_loss():
    network, x = small(drop_path_rate=0.0, dropout_rate=0.0), video()
    # Coarse regions: the logits are made on a quarter of the resolution.
    target = (avg_pool3d(x[:, :, 0], (1, 8, 8)) > 0).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    target = target.unsqueeze(2).expand(-1, -1, 3, -1, -1)
    losses = losses_of_training(network, x, target, binary_cross_entropy_with_logits, steps=25)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_stays_finite_and_close(dtype):
    network, x = small(edge=True).eval(), video()
    with torch.no_grad():
        want = network(x)
        with torch.autocast("cpu", dtype=dtype):
            got = network(x)
    for out, wanted in zip(got, want, strict=True):
        assert torch.isfinite(out).all()
        assert (out - wanted).norm() < 0.05 * wanted.norm()


def test_copies_and_compilation_give_the_same_logits():
    network, x = small().eval(), video()
    other = small().eval()
    load_official(other, network.state_dict())
    with torch.no_grad():
        want = network(x)
        assert torch.equal(other(x), want)
        assert torch.equal(copy.deepcopy(network)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(network))(x), want)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), want, atol=1e-5)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers, which is missing; run pip install "vssm\[video\]"'):
        small()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(in_channels=0), "in_channels holds 0"),
        (dict(out_channels=0), "out_channels holds 0"),
        (dict(hidden_size=0), "hidden_size holds 0"),
        (dict(depths=(1, 1, 1)), "depths has 3 entries; 4 are needed"),
        (dict(features=(4, 8, 8, 0)), "features holds 0"),
        (dict(mamba_depths=(1, 0, 1, 1)), "mamba_depths holds 0"),
        (dict(num_heads=(1, 2, 3, 3)), r"num_heads \(1, 2, 3, 3\) must divide features \(4, 8, 8, 12\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(overrides, words):
    with pytest.raises(ValueError, match=words):
        small(**overrides)


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 2, 32, 32), "frames, channels, height, width"),
        ((1, 3, 1, 32, 32), "2 channels"),
        ((0, 3, 2, 32, 32), "at least one frame"),
        ((1, 0, 2, 32, 32), "at least one frame"),
        ((1, 3, 2, 31, 64), r"at least 32 pixels a side, got \(31, 64\); pad to \(32, 64\)"),
    ],
)
def test_videos_that_do_not_fit_are_refused_with_what_fits(shape, words):
    with pytest.raises(ValueError, match=words):
        small()(torch.randn(shape))
