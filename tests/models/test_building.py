"""Published weights through create_model: from a server, and what is said when they cannot be had."""

import io

import pytest
import serving
import timm
import torch
from families import create, family, images
from timm.models import get_pretrained_cfg

from vssm import weights, zoo

NAME = "vmamba_tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that downloads are kept in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server():
    with serving.running() as running:
        yield running


def saved(model: torch.nn.Module) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": model.state_dict()}, stream)
    return stream.getvalue()


def pretrained(features_only: bool = False, **overlay) -> torch.nn.Module:
    arguments = {**family(NAME).small, "features_only": features_only}
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


def test_weights_are_downloaded_kept_and_loaded(server, cache):
    model, x = create(NAME), images(1, 3, 32, 32)
    server.files["weights.pth"] = saved(model)
    got = pretrained(url=f"{server.address}/weights.pth")
    assert torch.equal(got(x), model(x))
    # The tensors of the file are not kept a second time.
    assert "state_dict" not in got.pretrained_cfg
    server.files.clear()
    # The second time comes from the folder of downloads.
    assert {"weights.pth", "vssm-zoo.lock.json"} <= {path.name for path in cache.iterdir()}
    assert torch.equal(pretrained(url=f"{server.address}/weights.pth")(x), model(x))


def test_features_load_too_and_keep_no_second_copy(server, cache):
    server.files["weights.pth"] = saved(create(NAME))
    got = pretrained(url=f"{server.address}/weights.pth", features_only=True)
    for maps, want in zip(
        got(images(1, 3, 32, 32)), create(NAME, features_only=True)(images(1, 3, 32, 32)), strict=True
    ):
        assert torch.equal(maps, want)
    assert "state_dict" not in got.pretrained_cfg and "state_dict" not in got.model.pretrained_cfg


def test_a_file_that_was_replaced_is_not_loaded(server, cache):
    server.files["weights.pth"] = saved(create(NAME))
    pretrained(url=f"{server.address}/weights.pth")
    (cache / "weights.pth").write_bytes(saved(create(NAME, seed=1)))
    with pytest.raises(RuntimeError, match=r"weights\.pth has the SHA-256 .* but had .* when it was first used"):
        pretrained(url=f"{server.address}/weights.pth")


def test_weights_added_by_hand_load(tmp_path, cache):
    model, x = create("groupmamba_tiny"), images(1, 3, 32, 32)
    (tmp_path / "from_drive.pth").write_bytes(saved(model))
    weights.add(zoo.published()["groupmamba_tiny.in1k"], tmp_path / "from_drive.pth")
    assert torch.equal(create("groupmamba_tiny", seed=2, pretrained=True)(x), model(x))


def test_a_damaged_or_hostile_file_is_refused_with_its_name(tmp_path, cache):
    (tmp_path / "bad.pth").write_bytes(saved(create(NAME))[:-1000])
    with pytest.raises(ValueError, match=r"bad\.pth is damaged"):
        pretrained(file=str(tmp_path / "bad.pth"))
    torch.save({"model": {"a": print}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth names the global print"):
        pretrained(file=str(tmp_path / "evil.pth"))


def test_a_failed_download_names_the_address_the_place_and_the_call(server, cache):
    address = f"{server.address}/none.pth"
    with pytest.raises(RuntimeError) as caught:
        pretrained(url=address)
    said = str(caught.value)
    for part in (address, "404", str(cache / "none.pth"), "by hand", 'pretrained_cfg_overlay=dict(file="PATH")'):
        assert part in said
    assert "\n" not in said


def test_no_server_at_all_is_said_the_same_way(cache):
    with pytest.raises(RuntimeError, match=r"could not be downloaded from http://127.0.0.1:9/x.pth"):
        pretrained(url="http://127.0.0.1:9/x.pth")


def test_weights_without_a_download_name_the_page(cache):
    page = get_pretrained_cfg("msvmamba_nano").notes[0]
    with pytest.raises(RuntimeError) as caught:
        timm.create_model("msvmamba_nano", pretrained=True)
    assert "no direct download" in str(caught.value) and page in str(caught.value)


def test_a_file_that_is_missing_or_of_another_model_is_not_a_failed_download(tmp_path, cache):
    with pytest.raises(FileNotFoundError):
        pretrained(file=str(tmp_path / "none.pth"))
    torch.save({"model": {"head.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit VMamba"):
        pretrained(file=str(tmp_path / "other.pth"))
