"""Published weights through create_model: from a server, and what is said when they cannot be had."""

import functools
import http.server
import threading

import pytest
import timm
import torch
from families import create, family, images
from timm.models import get_pretrained_cfg

NAME = "vmamba_tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that downloads are kept in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path):
    """(address, folder) of a web server on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()


def pretrained(**overlay) -> torch.nn.Module:
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **family(NAME).small).eval()


def test_weights_are_downloaded_kept_and_loaded(server, cache):
    address, folder = server
    model, x = create(NAME), images(1, 3, 32, 32)
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    assert torch.equal(pretrained(url=f"{address}/weights.pth")(x), model(x))
    (folder / "weights.pth").unlink()
    # The second time comes from the folder of downloads.
    assert [path.name for path in cache.iterdir()] == ["weights.pth"]
    assert torch.equal(pretrained(url=f"{address}/weights.pth")(x), model(x))


def test_a_failed_download_names_the_address_the_place_and_the_call(server, cache):
    address = f"{server[0]}/none.pth"
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
