"""MSVM-UNet: official outputs, official weights and pre-training, shapes, refused arguments."""

import parity
import pytest
import timm
import torch
from official import assert_parity, load_golden, official_state
from recording import recording

from vssm.checkpoint import load_official
from vssm.models import VMamba
from vssm.networks import MSVMUNet

TOLERANCE = 1e-4
FILES = {"msvm_unet": (2, 2, 8, 2), "msvm_unet_small": (2, 2, 20, 2)}
SMALL = dict(features=(8, 16, 32), depths=(1, 1, 2), decoder_depths=(1, 2))


def official(file, in_channels=3):
    golden = load_golden(file)
    network = MSVMUNet(2, in_channels, golden["source"]["kwargs"]["num_classes"], depths=FILES[file])
    return golden, network, official_state(golden)


def assert_official(network, golden):
    parts = {f"stage{i}": stage for i, stage in enumerate(network.encoder.stages)}
    for i, stage in enumerate(network.decoder):
        parts |= {f"expand{i}": stage.upsample, f"fuse{i}": stage.join, f"up{i}": stage}
    parts["mlp"] = network.decoder[0].blocks[0].mlp
    with recording(parts) as outputs, torch.inference_mode():
        outputs["logits"] = network.eval()(torch.from_numpy(parity.fill_input(golden["input"])))
    for tap, out in outputs.items():
        # The decoder's maps are channels last here.
        if not tap.startswith(("stage", "logits")):
            outputs[tap] = out.movedim(-1, 1)
    assert_parity(outputs, golden, TOLERANCE)


@pytest.mark.parametrize("file", FILES)
def test_official_weights_give_the_official_output_at_every_stage(file):
    golden, network, state = official(file)
    load_official(network, state)
    assert sum(p.numel() for p in network.parameters()) == golden["params"]
    assert_official(network, golden)


def test_the_settings_of_the_paper_are_the_defaults():
    with torch.device("meta"):
        network = MSVMUNet(2, 3, 9)
    assert sum(p.numel() for p in network.parameters()) == load_golden("msvm_unet")["params"]


def test_a_network_for_grey_images_takes_official_weights_for_rgb_with_the_same_result():
    golden, network, state = official("msvm_unet", in_channels=1)
    assert golden["input"][1] == 1
    load_official(network, state)
    assert_official(network, golden)


def test_a_file_of_the_official_trainer_loads_and_own_names_stay():
    _, network, state = official("msvm_unet")
    load_official(network, {"state_dict": {f"_model.{key}": value for key, value in state.items()}})
    once = {key: value.clone() for key, value in network.state_dict().items()}
    load_official(network, once)
    assert network.convert_official(once).keys() == once.keys()


def test_the_encoder_is_the_backbone_and_starts_from_its_weights():
    golden = load_golden("vmamba_tiny")
    network = MSVMUNet(2, 3, 2, encoder_weights={"model": official_state(golden)})
    assert isinstance(network.encoder, VMamba)
    parts = {f"stage{i}": stage for i, stage in enumerate(network.encoder.stages)}
    with recording(parts) as outputs, torch.inference_mode():
        # The golden file's image has no size that the decoder takes.
        network.eval().encoder.forward_intermediates(torch.from_numpy(parity.fill_input(golden["input"])))
    for tap, out in outputs.items():
        assert parity.relative_error(out.numpy(), golden["outputs"][tap]) <= TOLERANCE


def test_weights_of_our_own_backbone_start_the_encoder_from_a_file_for_any_number_of_channels(tmp_path):
    vmamba = timm.create_model("vmamba_tiny").state_dict()
    torch.save(vmamba, tmp_path / "vmamba.pth")
    rgb = vmamba["stem.conv1.weight"]
    # As timm adapts a first convolution: summed, or repeated and scaled.
    for in_channels, want in [(1, rgb.sum(1, keepdim=True)), (3, rgb), (4, 0.75 * rgb[:, [0, 1, 2, 0]])]:
        stem = MSVMUNet(2, in_channels, 2, encoder_weights=tmp_path / "vmamba.pth").encoder.stem
        torch.testing.assert_close(stem.conv1.weight, want)
        assert torch.equal(stem.conv2.weight, vmamba["stem.conv2.weight"])


def test_weights_of_another_backbone_are_refused():
    with torch.device("meta"):
        vmamba, other = (timm.create_model(name).state_dict() for name in ("vmamba_tiny", "vmambav0_tiny"))
        with pytest.raises(ValueError, match="does not fit VMamba"):
            MSVMUNet(2, 3, 2, encoder_weights=vmamba, depths=(2, 2, 20, 2))
        with pytest.raises(ValueError, match="does not fit VMamba"):
            MSVMUNet(2, 3, 2, encoder_weights=other)
        del vmamba["stages.2.blocks.0.norm2.bias"]
        with pytest.raises(ValueError, match=r"Mismatches \(1\):\s+stages\.2\.blocks\.0\.norm2\.bias .* is missing"):
            MSVMUNet(2, 3, 2, encoder_weights=vmamba)


# Arguments and the shapes of image and logits.
SHAPES = [
    (dict(in_channels=1, out_channels=3), (2, 1, 32, 48), (2, 3, 32, 48)),
    (dict(in_channels=3, out_channels=1), (1, 1, 64, 32), (1, 1, 64, 32)),
    (
        dict(in_channels=2, out_channels=2, features=(4, 8), depths=(1, 1), decoder_depths=(2,)),
        (1, 2, 40, 32),
        (1, 2, 40, 32),
    ),
]


@pytest.mark.parametrize("arguments, image, logits", SHAPES)
def test_logits_have_the_size_of_the_image(arguments, image, logits):
    with torch.no_grad():
        assert MSVMUNet(2, **SMALL | arguments).eval()(torch.randn(image)).shape == logits


def test_deeper_blocks_are_dropped_more_in_the_encoder_and_in_the_decoder():
    network = MSVMUNet(2, 1, 2, **SMALL, drop_path_rate=0.3, decoder_drop_path_rate=0.2)

    def rates(stages):
        blocks = [block for stage in stages for block in stage.blocks]
        return [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]

    assert rates(network.encoder.stages) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert rates(network.decoder) == pytest.approx([0.2, 0.1, 0])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(spatial_dims=3), "spatial_dims is 3"),
        (dict(in_channels=0), "in_channels holds 0"),
        (dict(depths=(1, 1, 1, 1)), "decoder_depths has 2 entries; 3 are needed"),
        (dict(features=(8, 16)), "depths and dims need one entry per stage"),
        (dict(decoder_depths=(0, 1)), "decoder_depths holds 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        MSVMUNet(**dict(spatial_dims=2, in_channels=1, out_channels=2) | SMALL | change)


def test_training_on_one_position_is_refused_with_what_helps():
    network = MSVMUNet(2, 1, 2, features=(8, 16, 32, 64), depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1))
    x = torch.randn(1, 1, 32, 32)
    with pytest.raises(ValueError, match="more than one position at the deepest stage"):
        network(x)
    assert network(x.repeat(2, 1, 1, 1)).shape == (2, 2, 32, 32)
    assert network.eval()(x).shape == (1, 2, 32, 32)


def test_the_published_network_names_the_nearest_sizes():
    with torch.device("meta"):
        network = MSVMUNet(2, 3, 1).eval()
    with pytest.raises(ValueError, match=r"divisible by 32, got \(100, 64\); pad to \(128, 64\) or crop to \(96, 64\)"):
        network(torch.zeros(1, 3, 100, 64))
