"""Downloads from servers that behave, break off, move, refuse and lie."""

import errno
import random
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request

import pytest
from serving import breaks_after, says

from vssm.weights.download import DownloadError, _Redirects, download

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def fetch(server, tmp_path):
    """fetch() downloads CONTENT from the scripted server; returns the file's path."""
    server.files["w.pth"] = CONTENT

    def call(**options):
        download(f"{server.address}/w.pth", tmp_path / "w.pth", **options)
        return tmp_path / "w.pth"

    return call


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_alone(fetch, tmp_path):
    assert fetch().read_bytes() == CONTENT
    assert names(tmp_path) == ["w.pth"]


def test_a_broken_connection_continues_where_it_broke(fetch, server, tmp_path):
    server.script += [breaks_after(100_000), breaks_after(250_000)]
    assert fetch().read_bytes() == CONTENT
    assert server.ranges == ["", "bytes=100000-", "bytes=250000-"]
    assert names(tmp_path) == ["w.pth"]


def test_a_connection_that_always_breaks_leaves_what_came_for_the_next_call(fetch, server, tmp_path):
    server.script += [breaks_after(1000 * i) for i in range(1, 5)]
    with pytest.raises(DownloadError, match=r"broke after 4000 of 300000 bytes, 4 times; what came is kept"):
        fetch()
    assert names(tmp_path) == ["w.pth.partial", "w.pth.partial.state"]
    assert fetch().read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=4000-"
    assert names(tmp_path) == ["w.pth"]


def test_a_truncated_body_is_never_taken_for_the_file(fetch, server, tmp_path):
    # without a name for the file's state nothing can be continued: every attempt starts anew
    server.script += [breaks_after(200_000, tag=False)] * 4
    with pytest.raises(DownloadError, match="broke after 200000 of 300000"):
        fetch()
    assert server.ranges == [""] * 4
    assert "w.pth" not in names(tmp_path)


def test_a_part_of_another_state_of_the_file_is_thrown_away(fetch, server):
    server.script += [breaks_after(1000)] * 4
    with pytest.raises(DownloadError):
        fetch()
    server.files["w.pth"] = CONTENT[::-1]
    assert fetch().read_bytes() == CONTENT[::-1]


def test_a_whole_part_is_not_fetched_again(fetch, server, tmp_path):
    fetch()
    server.script += [breaks_after(1000)] * 4
    with pytest.raises(DownloadError):
        fetch()
    (tmp_path / "w.pth.partial").write_bytes(CONTENT)
    assert fetch().read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=300000-"


def test_a_part_that_is_too_long_starts_anew(fetch, server, tmp_path):
    server.script += [breaks_after(1000)] * 4
    with pytest.raises(DownloadError):
        fetch()
    (tmp_path / "w.pth.partial").write_bytes(CONTENT + b"more")
    assert fetch().read_bytes() == CONTENT


def moved(address: str):
    """An answer that sends the client elsewhere."""

    def answer(handler, content):
        handler.send_response(302)
        handler.send_header("Location", address)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def test_redirects_are_followed_and_what_they_lead_to_is_continued(fetch, server):
    server.files["elsewhere.pth"] = CONTENT[:5000]
    elsewhere = moved(f"{server.address}/elsewhere.pth")
    server.script += [elsewhere, breaks_after(2000), elsewhere]
    assert fetch().read_bytes() == CONTENT[:5000]
    assert server.ranges == ["", "", "bytes=2000-", "bytes=2000-"]


def test_a_redirect_to_a_file_of_this_machine_or_out_of_encryption_is_refused(fetch, server):
    server.script.append(moved("file:///etc/passwd"))
    with pytest.raises(DownloadError):
        fetch()
    secure = urllib.request.Request("https://example.org/w.pth")
    with pytest.raises(DownloadError, match=r"redirects from https to http://example\.org"):
        _Redirects().redirect_request(secure, None, 302, "", {}, "http://example.org/w.pth")


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_said_at_once(fetch, server, tmp_path, code):
    server.script.append(says(code))
    with pytest.raises(DownloadError, match=f"the server says HTTP {code}"):
        fetch()
    assert len(server.ranges) == 1 and names(tmp_path) == []


def test_a_server_that_is_busy_is_asked_again(fetch, server):
    server.script += [says(503), says(429)]
    assert fetch().read_bytes() == CONTENT


def test_a_web_page_is_no_file(fetch, server, tmp_path):
    def page(handler, content):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html; charset=utf-8")
        handler.end_headers()
        handler.wfile.write(b"<html>Google Drive can't scan this file for viruses</html>")

    server.script.append(page)
    with pytest.raises(DownloadError, match="a web page instead of the file"):
        fetch()
    assert names(tmp_path) == []


def test_a_server_that_hangs_up_without_an_answer_is_asked_again(fetch, server):
    server.script.append(lambda handler, content: handler.connection.close())
    assert fetch().read_bytes() == CONTENT


def test_a_full_disk_is_seen_before_anything_is_written(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(DownloadError, match=r"no space left for 0.3 MB in .*; free some"):
        fetch()
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_on_the_way_is_said_and_the_part_kept(fetch, server, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vssm.weights.download.os.fsync", full)
        with pytest.raises(DownloadError, match="no space left in"):
            fetch()
    assert "w.pth" not in names(tmp_path)
    assert fetch().read_bytes() == CONTENT


def test_a_file_that_fails_its_check_never_appears(fetch, tmp_path):
    def refuse(path):
        assert path.read_bytes() == CONTENT
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        fetch(check=refuse)
    assert names(tmp_path) == []


def test_a_broken_encryption_counts_as_a_broken_connection(fetch, server, monkeypatch):
    reads = []

    def read(self, size):
        reads.append(size)
        raise ssl.SSLError("bad record")

    monkeypatch.setattr("http.client.HTTPResponse.read", read)
    with pytest.raises(DownloadError, match="bad record"):
        fetch()
    assert len(reads) == 4


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "w.pth"])
def test_only_web_addresses_are_downloaded(tmp_path, url):
    with pytest.raises(DownloadError, match="only http and https"):
        download(url, tmp_path / "x")


def test_no_connection_is_said_at_once(tmp_path):
    with pytest.raises(DownloadError, match="no connection"):
        download("http://127.0.0.1:9/x", tmp_path / "x")


def test_a_killed_download_is_continued(server, tmp_path):
    server.files["w.pth"] = CONTENT

    def slowly(handler, content):
        handler.serve(content, 100_000)
        handler.wfile.flush()
        handler.connection.settimeout(60)
        # until the client is gone
        handler.rfile.read(1)

    server.script.append(slowly)
    code = "import sys, pathlib, vssm.weights.download as d; d._STEP = 10_000; "
    code += "d.download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    path, part = tmp_path / "w.pth", tmp_path / "w.pth.partial"
    process = subprocess.Popen([sys.executable, "-c", code, f"{server.address}/w.pth", path], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size >= 50_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not path.exists()
    download(f"{server.address}/w.pth", path)
    assert path.read_bytes() == CONTENT and server.ranges[-1].startswith("bytes=")
