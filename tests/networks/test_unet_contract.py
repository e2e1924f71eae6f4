"""What every network must do: train, take MONAI's tensors, copy; and those of the VMamba family besides."""

import copy

import pytest
import torch
from monai.data import MetaTensor
from torch.nn.functional import cross_entropy

from vssm.checkpoint import load_official
from vssm.networks import MHSVMUNet, MSVMUNet, UMambaBot, UMambaEnc, VMUNet

# Name -> (class, spatial dimensions, arguments, size of an image).
VSS = dict(features=(8, 16), depths=(1, 2), decoder_depths=(1, 1), d_state=2)
VSS_NETWORKS = {
    "vmunet_2d": (VMUNet, 2, VSS, (16, 24)),
    "vmunet_3d": (VMUNet, 3, VSS, (16, 8, 8)),
    "mhsvmunet": (MHSVMUNet, 2, VSS, (16, 24)),
    "msvmunet": (MSVMUNet, 2, dict(features=(8, 16), depths=(1, 2), decoder_depths=(1,)), (32, 40)),
}
UMAMBA = dict(
    features=(4, 8, 16), strides=(1, 2, 2), kernel_sizes=(3, 3, 3), num_blocks=(1, 2, 1), num_decoder_blocks=(1, 1)
)
NETWORKS = VSS_NETWORKS | {
    "umambabot_2d": (UMambaBot, 2, UMAMBA, (8, 8)),
    "umambabot_3d": (UMambaBot, 3, UMAMBA, (8, 8, 8)),
    "umambaenc_2d": (UMambaEnc, 2, UMAMBA | {"img_size": 8}, (8, 8)),
    "umambaenc_3d": (UMambaEnc, 3, UMAMBA | {"img_size": 8}, (8, 8, 8)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_vss_network = pytest.mark.parametrize("name", VSS_NETWORKS)


def made(name, batch=2, **overrides):
    cls, spatial_dims, arguments, size = NETWORKS[name]
    torch.manual_seed(0)
    network = cls(spatial_dims, 2, 3, **arguments | overrides)
    return network, torch.randn(batch, 2, *size)


@each_network
def test_every_parameter_gets_a_gradient(name):
    network, x = made(name)
    # Nothing is dropped in evaluation.
    network.eval()(x).square().sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@each_network
def test_training_lowers_the_loss(name):
    network, x = made(name)
    target = (x[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(36):
        loss = cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@each_network
def test_an_image_gives_the_same_logits_alone_and_in_a_batch(name):
    network, x = made(name)
    # In float32 the convolutions round differently for another batch size; float64 shows that nothing else differs.
    network, x = network.double().eval(), x.double()
    with torch.no_grad():
        torch.testing.assert_close(network(x)[1:], network(x[1:]), rtol=1e-10, atol=1e-10)


@each_network
def test_a_monai_meta_tensor_gives_the_same_logits_and_gradients(name):
    network, image = made(name)
    network.eval()
    logits = network(image)
    logits.square().mean().backward()
    want = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    got = network(MetaTensor(image))
    assert isinstance(got, MetaTensor) and torch.equal(got.as_tensor(), logits)
    got.square().mean().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(network.parameters(), want, strict=True))


@each_vss_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_gradients_are_finite_under_autocast(name, dtype):
    network, x = made(name)
    with torch.autocast("cpu", dtype=dtype):
        logits = network(x)
    assert torch.isfinite(logits).all()
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


# MHS-VM is left out: its output changes thousands of times as much as its weights, so half precision shows nothing.
@pytest.mark.parametrize("name", [name for name in VSS_NETWORKS if name != "mhsvmunet"])
def test_bfloat16_autocast_stays_close(name):
    network, x = made(name)
    network.eval()
    with torch.no_grad():
        wanted = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(x)
    assert (out - wanted).norm() < 0.05 * wanted.norm()


@each_vss_network
def test_compiles_without_graph_breaks_and_exports(name):
    # Two networks share code here: without a reset the second would be compiled for sizes that vary, which is slow.
    torch.compiler.reset()
    network, x = made(name, depths=(1, 1))
    network.eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    exported = torch.export.export(network, (x,)).module()
    with torch.no_grad():
        for other in (compiled, exported):
            torch.testing.assert_close(other(x), network(x), rtol=1e-4, atol=1e-5)


@each_network
def test_own_state_dicts_load_and_copies_give_the_same_logits(name):
    network, x = made(name)
    network.eval()
    other = made(name)[0].eval()
    for parameter in other.parameters():
        parameter.data.zero_()
    load_official(other, network.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), network(x))
        assert torch.equal(copy.deepcopy(network)(x), network(x))


@each_vss_network
def test_images_of_one_channel_are_repeated_for_a_network_of_three(name):
    cls, spatial_dims, arguments, size = VSS_NETWORKS[name]
    network = cls(spatial_dims, 3, 2, **arguments).eval()
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        assert torch.equal(network(x), network(torch.cat([x, x, x], 1)))


@each_vss_network
def test_images_that_do_not_fit_are_refused_with_what_fits(name):
    network, x = made(name)
    divisor, size = network.size_divisor, tuple(x.shape[2:])
    assert divisor == 8
    bad = [
        (x[:, :, 0], "spatial axes"),
        (x[..., None], "spatial axes"),
        (x[:, :1], "2 channels"),
        (torch.cat([x, x], 1), "2 channels"),
        (x[:0], "the batch is empty"),
        (x[..., :-1], rf"divisible by 8, got .*{size[-1] - 1}\); pad to \({', '.join(map(str, size))}\)"),
        (x[..., :0], "divisible by 8, got .* 0"),
    ]
    for image, words in bad:
        with pytest.raises(ValueError, match=words):
            network(image)


@each_network
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="feature_size"):
        made(name, feature_size=64)
