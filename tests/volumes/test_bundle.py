"""A bundle is data: it is used as written, or refused with the file and the entry; nothing in it is ever run."""

import json

import pytest
import torch
from monai.networks.nets import UNet
from safetensors.torch import load_file
from volumes.samples import write_bundle

import vssm.networks
from vssm import zoo
from vssm.volumes import VolumeError, default_bundle_path, find_bundle, load_bundle


@pytest.fixture
def edit(bundle_folder):
    """edit(*keys, value) changes one entry of inference.json; a value of None removes it."""

    def change(*keys, value, name="inference.json"):
        path = bundle_folder / "configs" / name
        config = json.loads(path.read_text())
        entry = config
        for key in keys[:-1]:
            entry = entry[key]
        if value is None:
            del entry[keys[-1]]
        else:
            entry[keys[-1]] = value
        path.write_text(json.dumps(config))
        return bundle_folder

    return change


def refused(folder, words):
    with pytest.raises(VolumeError) as caught:
        load_bundle(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_bundle_gives_network_weights_window_and_labels(bundle_folder):
    loaded = load_bundle(bundle_folder)
    assert loaded.name == "tiny_bundle"
    assert loaded.labels == ("background", "grey matter", "white matter")
    assert loaded.field_of_view_mm == (180, 220, 180)
    assert loaded.foreground_ml == 1500
    assert loaded.window["roi_size"] == [16, 16, 16]
    assert [type(step).__name__ for step in loaded.preprocessing] == ["Orientationd", "Spacingd", "NormalizeIntensityd"]
    assert isinstance(loaded.network, UNet)
    assert not loaded.network.training
    stored = load_file(bundle_folder / "models" / "model.safetensors")
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, stored[name]), name


def test_windows_are_blended_by_a_gaussian_unless_the_bundle_says_otherwise(edit):
    assert load_bundle(edit("inferer", "mode", value=None)).window["mode"] == "gaussian"
    assert load_bundle(edit("inferer", "mode", value="constant")).window["mode"] == "constant"


def test_a_pytorch_file_serves_where_there_is_no_safetensors(bundle_folder):
    stored = load_file(bundle_folder / "models" / "model.safetensors")
    torch.save(stored, bundle_folder / "models" / "model.pt")
    (bundle_folder / "models" / "model.safetensors").unlink()
    loaded = load_bundle(bundle_folder).network.state_dict()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_a_vssm_network_is_built_by_name(edit, bundle_folder, monkeypatch):
    monkeypatch.setattr(vssm.networks, "Tiny", type("Tiny", (UNet,), {}), raising=False)
    network = json.loads((bundle_folder / "configs" / "inference.json").read_text())["network_def"]
    loaded = load_bundle(edit("network_def", value=network | {"_target_": "vssm.networks.Tiny"}))
    assert type(loaded.network).__name__ == "Tiny"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "builtins.eval",
        "torch.nn.Conv3d",
        "vssm.checkpoint.read_checkpoint",
        "vssm.networks.umamba.torch.hub.load",
        "monai.networks.nets.unet.torch.load",
        "monai.networks.nets.unet",
        "monai.networks.nets.resnet10",
        "monai.networks.nets.",
        "Undefined",
    ],
)
def test_only_networks_of_vssm_and_monai_are_built(edit, target):
    refused(edit("network_def", "_target_", value=target), "give a class of vssm.networks or monai.networks.nets")


@pytest.mark.parametrize("text", ["$__import__('os').system('touch ran')", "@device", "%metadata::version"])
@pytest.mark.parametrize(
    "keys",
    [("network_def", "out_channels"), ("inferer", "overlap"), ("preprocessing", "transforms"), ("network_def",)],
    ids="-".join,
)
def test_expressions_are_refused_and_not_run(edit, tmp_path, monkeypatch, keys, text):
    monkeypatch.chdir(tmp_path)
    refused(edit(*keys, value=text), "does not evaluate bundles")
    assert not (tmp_path / "ran").exists()


def test_expressions_elsewhere_in_the_file_are_left_alone(edit):
    load_bundle(edit("device", value="$torch.device('cuda')"))


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (("network_def",), None, "lacks network_def"),
        (("preprocessing",), None, "lacks preprocessing"),
        (("inferer",), None, "lacks inferer"),
        (("network_def",), ["UNet"], "must be an object with a _target_"),
        (("network_def", "norm"), {"_target_": "os.system"}, "plain arguments"),
        (("network_def", "_mode_"), "debug", "plain arguments"),
        (("network_def", "unknown_option"), 1, "does not fit monai.networks.nets.UNet"),
        (("network_def", "channels"), [4], "does not fit monai.networks.nets.UNet"),
        (("preprocessing", "_target_"), "Lambda", "must be a Compose"),
        (("preprocessing", "transforms", 2), {"_target_": "Lambdad", "keys": "image"}, "supported on the key 'image'"),
        (("preprocessing", "transforms", 2, "keys"), ["image", "label"], "supported on the key 'image'"),
        (("preprocessing", "transforms", 2, "axcodes"), "XYZ", "does not work"),
        (("preprocessing", "transforms", 2, "typo"), 1, "cannot build"),
        (("inferer", "_target_"), "SimpleInferer", "must be a SlidingWindowInferer"),
        (("inferer", "roi_size"), [16, 16], "three positive roi_size"),
        (("inferer", "roi_size"), [16, 16, 0], "three positive roi_size"),
        (("inferer", "typo"), 1, "inferer sets typo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_entry_is_named(edit, keys, value, words):
    refused(edit(*keys, value=value), words)


@pytest.mark.parametrize(
    "channels", [{}, {"0": "inside"}, {"0": "a", "2": "b"}, {str(index): "x" for index in range(257)}], ids=len
)
def test_labels_must_be_complete(edit, channels):
    folder = edit("network_data_format", "outputs", "pred", "channel_def", value=channels, name="metadata.json")
    refused(folder, "must name 2 to 256 outputs")


@pytest.mark.parametrize(
    "section",
    [
        {},
        [180],
        {"field_of_view_mm": [180, 220], "foreground_ml": 9},
        {"field_of_view_mm": [1, 1, 1], "foreground_ml": 0},
    ],
    ids=str,
)
def test_what_was_learned_from_must_be_complete_if_given(edit, section):
    refused(edit("learned_from", value=section, name="metadata.json"), "learned_from" if section else "lacks")


def test_what_was_learned_from_may_be_left_out(edit):
    loaded = load_bundle(edit("learned_from", value=None, name="metadata.json"))
    assert loaded.field_of_view_mm is None
    assert loaded.foreground_ml is None


@pytest.mark.parametrize("name", ["inference.json", "metadata.json"])
def test_missing_and_damaged_configs_are_named(bundle_folder, name):
    path = bundle_folder / "configs" / name
    for content in ("{", "[1]", "\udcff"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        refused(bundle_folder, name)
    path.unlink()
    refused(bundle_folder, name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_damaged_weights_are_refused(bundle_folder, name):
    (bundle_folder / "models" / "model.safetensors").unlink()
    refused(bundle_folder, "holds neither model.safetensors nor model.pt")
    for content in (b"", b"x" * 100):
        (bundle_folder / "models" / name).write_bytes(content)
        refused(bundle_folder, "get the file again")


def test_weights_of_another_network_are_refused(edit):
    refused(edit("network_def", "out_channels", value=5), "does not fit the bundle's network")


def test_weights_that_would_run_code_are_refused(bundle_folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (bundle_folder / "models" / "model.safetensors").unlink()
    torch.save({"weight": Attack()}, bundle_folder / "models" / "model.pt")
    refused(bundle_folder, "model.pt")
    assert not (tmp_path / "ran").exists()


def test_bundles_are_found_by_path_and_by_name_in_package_and_checkout(bundle_folder, tmp_path, monkeypatch):
    assert find_bundle(bundle_folder) == bundle_folder
    monkeypatch.setattr(zoo, "FOLDERS", (tmp_path / "none", bundle_folder.parent))
    assert find_bundle("tiny_bundle") == bundle_folder


def test_a_missing_bundle_is_named_with_those_there_are(bundle_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "FOLDERS", (bundle_folder.parent,))
    with pytest.raises(VolumeError, match=r"lungs: no such bundle; .*\(tiny_bundle\)"):
        find_bundle("lungs")
    with pytest.raises(VolumeError, match="no configs folder"):
        find_bundle(bundle_folder / "models")
    monkeypatch.setattr(zoo, "FOLDERS", ())
    with pytest.raises(VolumeError, match="this installation has none: reinstall vssm"):
        default_bundle_path()


def test_the_network_takes_as_many_images_as_the_bundle_says(edit, bundle_folder):
    assert load_bundle(bundle_folder).in_channels == 1
    edit("network_data_format", "inputs", value={"image": {"num_channels": 2}}, name="metadata.json")
    refused(bundle_folder, "the image has 2 channels, the network takes 1")
    edit("network_data_format", "inputs", value={"image": {"num_channels": 0}}, name="metadata.json")
    refused(bundle_folder, "the image has 0 channels")
    edit("network_data_format", "inputs", value={"image": {"num_channels": 1}}, name="metadata.json")
    assert load_bundle(bundle_folder).in_channels == 1
    assert load_bundle(write_bundle(bundle_folder.parent / "four", channels=4)).in_channels == 4


def test_the_digest_tells_other_weights_and_settings_and_nothing_else(edit, bundle_folder):
    first = load_bundle(bundle_folder).digest
    assert first == load_bundle(write_bundle(bundle_folder.parent / "copy")).digest
    assert first != load_bundle(write_bundle(bundle_folder.parent / "other", seed=1)).digest
    assert first != load_bundle(edit("inferer", "overlap", value=0.25)).digest
