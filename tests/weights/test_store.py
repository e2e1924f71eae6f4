"""The folder of weights and its lock file."""

import json
import multiprocessing
from dataclasses import replace
from hashlib import sha256

import pytest

from vssm import zoo
from vssm.weights import WeightsError, add, by_hand, fetch, get, store
from vssm.weights.store import LOCK_NAME

CONTENT = b"weights" * 1000
DIGEST = sha256(CONTENT).hexdigest()


@pytest.fixture
def facts(server):
    """A row of the zoo whose file the scripted server has."""
    server.files["vmamba.pth"] = CONTENT
    return replace(zoo.published()["vmamba_tiny.s1l8_in1k"], url=f"{server.address}/vmamba.pth")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


def lock(folder) -> dict:
    return json.loads((folder / LOCK_NAME).read_text())["files"]


def test_the_first_use_records_the_hash_and_the_second_needs_no_network(facts, folder, server):
    kept = get(facts, folder)
    assert kept.path.read_bytes() == CONTENT and (kept.sha256, kept.bytes) == (DIGEST, 7000)
    assert kept.weights == facts.name and kept.source == facts.url
    written = (folder / LOCK_NAME).read_text()
    server.files.clear()
    assert get(facts, folder) == kept
    assert len(server.ranges) == 1 and (folder / LOCK_NAME).read_text() == written


def test_a_file_that_was_there_before_is_recorded(facts, folder, server):
    folder.mkdir()
    (folder / "vmamba.pth").write_bytes(CONTENT)
    assert get(facts, folder).sha256 == DIGEST
    assert server.ranges == [] and lock(folder)["vmamba.pth"]["sha256"] == DIGEST


def test_a_file_that_changed_since_is_not_used_but_left(facts, folder):
    path = get(facts, folder).path
    path.write_bytes(b"other")
    with pytest.raises(WeightsError, match=rf"but had {DIGEST} when it was first used; it was not used"):
        get(facts, folder)
    assert path.read_bytes() == b"other"


def test_a_file_that_its_server_replaced_is_not_even_kept(facts, folder, server):
    path = get(facts, folder).path
    path.unlink()
    server.files["vmamba.pth"] = b"other"
    with pytest.raises(WeightsError, match="first used"):
        get(facts, folder)
    assert not path.exists() and list(folder.glob("*.partial*")) == []
    assert lock(folder)["vmamba.pth"]["sha256"] == DIGEST


def test_a_hash_that_the_authors_publish_is_held_to(facts, folder):
    wrong = replace(facts, sha256="0" * 64)
    with pytest.raises(WeightsError, match="its authors publish 0000"):
        get(wrong, folder)
    assert not (folder / "vmamba.pth").exists() and not (folder / LOCK_NAME).exists()
    assert get(replace(facts, sha256=DIGEST), folder).sha256 == DIGEST


def test_a_failed_download_says_what_to_do_by_hand(facts, folder, server):
    server.files.clear()
    with pytest.raises(WeightsError) as caught:
        get(facts, folder)
    for part in (facts.url, "HTTP 404", "by hand", str(folder / "vmamba.pth")):
        assert part in str(caught.value)


def test_a_file_fetched_by_its_address_gets_its_name_later(facts, folder):
    assert fetch(facts.url, folder).weights == ""
    assert get(facts, folder).weights == facts.name == lock(folder)["vmamba.pth"]["weights"]


def test_a_file_of_the_same_name_from_elsewhere_is_not_taken_for_it(facts, folder, server):
    get(facts, folder)
    with pytest.raises(WeightsError, match=rf"came from {facts.url}, not from http://localhost"):
        fetch(f"http://localhost:{server.server_port}/vmamba.pth", folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("groupmamba_tiny.in1k", "choose Download and confirm"),
        ("msvmamba_tiny.in1k", "download the checkpoint from that Google Drive folder"),
        ("lbvim_tiny.in1k", "the asset of this model under Assets"),
        ("mhsvmunet_4h.isic18", "download best_4h.pth"),
        ("efficientvmamba_tiny.in1k", "download the checkpoint"),
        ("vmunet.isic", "password 8bqf"),
    ],
)
def test_the_steps_by_hand_fit_the_page(name, words, folder):
    facts = zoo.published()[name]
    with pytest.raises(WeightsError, match="no direct download") as caught:
        get(facts, folder)
    assert by_hand(facts) in str(caught.value)
    assert words in by_hand(facts) and facts.page in by_hand(facts)
    assert f"vssm zoo add {name} FILE" in by_hand(facts)


def test_a_file_added_by_hand_is_found_and_held_to(folder, tmp_path):
    facts = zoo.published()["groupmamba_tiny.in1k"]
    (tmp_path / "download (1).pth").write_bytes(CONTENT)
    kept = add(facts, tmp_path / "download (1).pth", folder)
    assert kept.path == folder / "groupmamba_tiny.in1k.pth" and kept.source == "by hand"
    assert get(facts, folder) == kept == add(facts, kept.path, folder)
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(WeightsError, match="when it was first used"):
        add(facts, tmp_path / "other.pth", folder)
    assert kept.path.read_bytes() == CONTENT
    with pytest.raises(FileNotFoundError):
        add(facts, tmp_path / "none.pth", folder)


def test_a_file_added_for_an_address_takes_its_place(facts, folder, tmp_path, server):
    (tmp_path / "by_hand.pth").write_bytes(CONTENT)
    assert add(facts, tmp_path / "by_hand.pth", folder).path == folder / "vmamba.pth"
    assert get(facts, folder).sha256 == DIGEST and server.ranges == []


@pytest.mark.parametrize(
    "content", ["", "{}", '{"files": []}', '{"files": {"a": {"sha256": "x"}}}', '{"files": {"a": 1}}']
)
def test_a_damaged_lock_file_is_named_and_left(facts, folder, content):
    folder.mkdir()
    (folder / LOCK_NAME).write_text(content)
    with pytest.raises(WeightsError, match=rf"{LOCK_NAME} is damaged .* restore it"):
        get(facts, folder)
    assert (folder / LOCK_NAME).read_text() == content


def _get(url: str, folder: str) -> str:
    return fetch(url, store.Path(folder)).sha256


def test_many_processes_fetch_a_file_once(facts, folder, server):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(_get, [(facts.url, str(folder))] * 4) == [DIGEST] * 4
    assert len(server.ranges) == 1
