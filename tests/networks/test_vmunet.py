"""VM-UNet: official outputs, official weights and pre-training, shapes in 2-D and 3-D, refused arguments."""

import parity
import pytest
import timm
import torch
from official import assert_parity, load_golden, meta_state, official_state
from vss_unets import golden_outputs

from vssm.checkpoint import load_official
from vssm.networks import VMUNet

TOLERANCE = 1e-4
FILES = ["vm_unet", "vm_unet_synapse", "vm_unet_deep"]
SMALL = dict(features=(8, 16, 32), depths=(1, 2, 1), decoder_depths=(1, 1, 2), d_state=2)


def published(golden, in_channels=3, **overrides):
    run = golden["source"]["kwargs"]
    depths = dict(depths=run["depths"], decoder_depths=run["depths_decoder"])
    return VMUNet(2, in_channels, run["num_classes"], **depths | overrides)


def assert_official(network, golden):
    block = network.encoder.stages[0].blocks[0]
    parts = {"b0": block, "b0.op": block.mixer} if "b0" in golden["outputs"] else {}
    assert_parity(golden_outputs(network, golden, parts), golden, TOLERANCE)


@pytest.mark.parametrize("file", FILES)
def test_official_weights_give_the_official_output_at_every_stage(file):
    golden = load_golden(file)
    network = published(golden)
    load_official(network, official_state(golden))
    assert sum(p.numel() for p in network.parameters()) == golden["params"]
    assert_official(network, golden)


def test_the_settings_of_the_paper_are_the_defaults():
    with torch.device("meta"):
        network = VMUNet(2, 3, 1)
    assert sum(p.numel() for p in network.parameters()) == load_golden("vm_unet")["params"]


def test_a_network_for_grey_images_takes_official_weights_for_rgb_with_the_same_result():
    golden = load_golden("vm_unet_synapse")
    assert golden["input"][1] == 1
    network = published(golden, in_channels=1)
    load_official(network, official_state(golden))
    assert_official(network, golden)
    with torch.device("meta"), pytest.raises(ValueError, match=r"conv1\.weight has shape \(96, 3, .* needs \(96, 2, "):
        load_official(published(golden, in_channels=2), meta_state("vm_unet_synapse"))


def test_files_of_the_official_trainer_load():
    golden = load_golden("vm_unet")
    state = official_state(golden)
    # Counters that the profiler thop adds to every module and removes from some.
    counters = {key: torch.zeros(1, dtype=torch.float64) for key in ("total_ops", "vmunet.layers.0.total_params")}
    network = published(golden)
    load_official(network, {"epoch": 3, "model_state_dict": counters | state, "optimizer_state_dict": {"state": {}}})
    assert torch.equal(network.classifier.weight, state["vmunet.final_conv.weight"])


def pretrained_state():
    golden = load_golden("vm_unet_pretrained")
    return golden, official_state({"state": golden["pretrained"]})


@pytest.mark.parametrize("as_file", [False, True])
def test_vmamba_weights_start_the_encoder_and_the_decoder_as_the_authors_start_them(as_file, tmp_path):
    golden, vmamba = pretrained_state()
    weights = {"model": vmamba}
    if as_file:
        torch.save(weights, tmp_path / "vmamba.pth")
        weights = tmp_path / "vmamba.pth"
    network = published(golden, encoder_weights=weights)
    # What is not in VMamba's file came from the network's own initialisation: here as in the official run.
    rest = network.convert_official(official_state(golden))
    rest = {key: value for key, value in rest.items() if "upsample" in key or "classifier" in key}
    network.load_state_dict(rest, strict=False)
    assert_official(network, golden)


def test_weights_of_our_own_backbone_start_the_encoder_for_any_number_of_channels():
    vmamba = timm.create_model("vmambav0_tiny").state_dict()
    rgb = vmamba["stem.conv1.weight"]
    # As timm adapts a first convolution: summed, or repeated and scaled.
    for in_channels, want in [(1, rgb.sum(1, keepdim=True)), (3, rgb), (4, 0.75 * rgb[:, [0, 1, 2, 0]])]:
        network = VMUNet(2, in_channels, 2, encoder_weights=vmamba)
        torch.testing.assert_close(network.encoder.stem.conv1.weight, want)
        own = network.encoder.state_dict()
        assert all(torch.equal(own[key], vmamba[key]) for key in own if key != "stem.conv1.weight")


def test_weights_of_another_backbone_are_refused():
    with torch.device("meta"):
        vmamba, other = (timm.create_model(name).state_dict() for name in ("vmambav0_tiny", "vmamba_tiny"))
    for change, words in [
        (dict(spatial_dims=3), r"conv1\.weight has shape \(96, 3, 4, 4\), the model needs \(96, 3, 4, 4, 4\)"),
        (dict(features=(48, 96, 192, 384)), "does not fit VMUNet"),
        (dict(depths=(2, 3, 2, 2)), r"encoder\.stages\.1\.blocks\.2\.norm1\.weight .* is missing"),
        (dict(decoder_depths=(2, 2, 3, 1)), r"decoder\.2\.blocks\.2\.norm1\.weight .* is missing"),
        (
            dict(depths=(2, 2, 2), decoder_depths=(2, 2, 1), features=(96, 192, 384)),
            r"stages\.3\..* is not in the model",
        ),
    ]:
        arguments = dict(spatial_dims=2, in_channels=3, out_channels=1) | change
        with torch.device("meta"), pytest.raises(ValueError, match=words):
            VMUNet(**arguments, encoder_weights=vmamba)
    with torch.device("meta"), pytest.raises(ValueError, match="does not fit VMUNet"):
        VMUNet(2, 3, 1, encoder_weights=other)
    with pytest.raises(FileNotFoundError):
        VMUNet(2, 3, 1, encoder_weights="no_such_file.pth")


# Arguments and the shapes of image and logits.
SHAPES = [
    (dict(spatial_dims=2, in_channels=1, out_channels=3), (2, 1, 16, 32), (2, 3, 16, 32)),
    (dict(spatial_dims=2, in_channels=3, out_channels=1), (1, 1, 32, 16), (1, 1, 32, 16)),
    (
        dict(spatial_dims=2, in_channels=4, out_channels=2, features=(4, 8), depths=(1, 1), decoder_depths=(2, 1)),
        (1, 4, 8, 24),
        (1, 2, 8, 24),
    ),
    (dict(spatial_dims=3, in_channels=2, out_channels=3), (2, 2, 16, 32, 16), (2, 3, 16, 32, 16)),
    (dict(spatial_dims=3, in_channels=3, out_channels=1), (1, 1, 32, 16, 16), (1, 1, 32, 16, 16)),
]


@pytest.mark.parametrize("arguments, image, logits", SHAPES)
def test_logits_have_the_size_of_the_image(arguments, image, logits):
    with torch.no_grad():
        assert VMUNet(**SMALL | arguments).eval()(torch.randn(image)).shape == logits


def test_volumes_are_scanned_along_three_axes_there_and_back():
    torch.manual_seed(0)
    network = VMUNet(3, 1, 2, **SMALL).double().eval()
    assert network.encoder.stages[0].blocks[0].mixer.scan.x_proj_weight.shape[0] == 6
    # One changed voxel reaches every corner: no axis is left out.
    x = torch.randn(1, 1, 16, 16, 16, dtype=torch.float64)
    changed = x.clone()
    changed[0, 0, 5, 9, 2] += 1
    with torch.no_grad():
        difference = (network(x) - network(changed)).abs()[0].amax(0)
    assert (difference[::15, ::15, ::15] > 0).all()


def test_deeper_blocks_are_dropped_more_in_the_encoder_and_in_the_decoder():
    network = VMUNet(2, 1, 2, **SMALL, drop_path_rate=0.3)

    def rates(stages):
        blocks = [block for stage in stages for block in stage.blocks]
        return [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]

    assert rates(network.encoder.stages) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert rates(network.decoder) == pytest.approx([0.3, 0.2, 0.1, 0])


def test_linear_layers_start_as_in_the_official_network():
    torch.manual_seed(0)
    network = VMUNet(2, 3, 1, features=(96, 192), depths=(1, 1), decoder_depths=(1, 1))
    for weight in (network.upsample.expand.weight, network.encoder.stages[1].blocks[0].mixer.out_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(spatial_dims=1), "spatial_dims is 1"),
        (dict(in_channels=0), "in_channels holds 0"),
        (dict(out_channels=0), "out_channels holds 0"),
        (dict(depths=(1, 1)), r"one entry per stage each, got \(1, 1\), \(1, 1, 2\) and \(8, 16, 32\)"),
        (dict(decoder_depths=(1, 1, 0)), "decoder_depths holds 0"),
        (dict(features=(6, 12, 24)), "divisible by 4.* got 6"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        VMUNet(**dict(spatial_dims=2, in_channels=1, out_channels=2) | SMALL | change)


def test_the_published_network_names_the_nearest_sizes():
    with torch.device("meta"):
        network = VMUNet(2, 3, 1)
    with pytest.raises(ValueError, match=r"divisible by 32, got \(100, 64\); pad to \(128, 64\) or crop to \(96, 64\)"):
        network(torch.zeros(1, 3, 100, 64))
    with pytest.raises(ValueError, match=r"got \(20, 64\); pad to \(32, 64\)$"):
        network(torch.zeros(1, 3, 20, 64))


def test_parity_notices_a_wrong_direction():
    golden = load_golden("vm_unet")
    network = published(golden)
    load_official(network, official_state(golden))
    scan = network.encoder.stages[0].blocks[0].mixer.scan
    scan.x_proj_weight.data = scan.x_proj_weight.data.roll(1, 0)
    x = torch.from_numpy(parity.fill_input(golden["input"]))
    with torch.no_grad():
        logits = network.eval()(x)
    assert parity.relative_error(logits.numpy(), golden["outputs"]["logits"]) > 10 * TOLERANCE
