"""The page of a volume: what it holds, and what a browser makes of it."""

import base64
import gzip
import json
import re
import shutil
import subprocess

import nibabel
import numpy as np
import pytest

from vssm import cli
from vssm.volumes import VolumeError, viewing
from vssm.volumes.viewing import write_page

SPACED = np.diag([2.0, 1.0, 4.0, 1.0])
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def case(save, rng):
    """Files of an image and two label maps of 12 x 10 x 8 voxels of 8 cubic mm."""
    image = rng.normal(100, 20, (12, 10, 8)).astype(np.float32)
    prediction, reference = np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint8)
    prediction[2:6, 2:6, 2:6], reference[3:7, 2:6, 2:6] = 1, 1
    reference[9:, 7:, 6:] = 4
    return [save(a, SPACED, f"{n}.nii.gz") for n, a in (("T1", image), ("p", prediction), ("r", reference))]


def content(page) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    return json.loads(text)


def decoded(text: str) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def rows(page) -> list[list[str]]:
    body = re.search(r"<tbody>(.*?)</tbody>", page.read_text(), re.DOTALL)[1]
    return [re.findall(r"<td>([^<]*)</td>", row) for row in body.split("</tr>")[:-1]]


def test_the_page_holds_volumes_labels_and_figures(case, tmp_path):
    page = tmp_path / "page.html"
    assert write_page(case[0], page, case[1], case[2], {1: "liver <left>", 7: "absent"}) == []
    data = content(page)
    image = decoded(data["image"])
    np.testing.assert_array_equal(image.get_fdata(), nibabel.load(case[0]).get_fdata())
    np.testing.assert_array_equal(image.affine, SPACED)
    for role, path in zip(("prediction", "reference"), case[1:], strict=True):
        np.testing.assert_array_equal(decoded(data["maps"][role]).get_fdata(), nibabel.load(path).get_fdata())
    assert [(label["value"], label["name"]) for label in data["labels"]] == [
        (1, "liver <left>"),
        (4, "label 4"),
        (7, "absent"),
    ]
    assert len({tuple(label["colour"]) for label in data["labels"]}) == 3
    # 64 voxels of 8 cubic mm, of which 48 agree.
    assert rows(page) == [
        ["liver &lt;left&gt;", "0.51", "0.51", "0.750"],
        ["label 4", "0.00", "0.14", "0.000"],
        ["absent", "0.00", "0.00", ""],
    ]
    assert "not a medical device" in page.read_text()


def test_without_label_maps_the_volume_alone_is_shown(case, tmp_path):
    write_page(case[0], tmp_path / "page.html")
    data = content(tmp_path / "page.html")
    assert data["maps"] == {} and data["labels"] == [] and rows(tmp_path / "page.html") == []


def test_large_volumes_are_thinned_out_and_say_so(case, tmp_path, monkeypatch):
    monkeypatch.setattr(viewing, "_SHOWN_VOXELS", 200)
    notes = write_page(case[0], tmp_path / "page.html", case[1], case[2])
    assert notes == ["the page shows one voxel in 2 along each axis; volumes and Dice count all of them"]
    image = decoded(content(tmp_path / "page.html")["image"])
    assert image.shape == (6, 5, 4)
    np.testing.assert_array_equal(np.diag(image.affine), [4, 2, 8, 1])
    assert rows(tmp_path / "page.html")[0] == ["label 1", "0.51", "0.51", "0.750"]


def test_label_maps_on_another_grid_are_refused(case, tmp_path, save):
    other = save(np.zeros((3, 3, 3), np.uint8), SPACED, "other.nii")
    with pytest.raises(VolumeError, match="resample the prediction"):
        write_page(case[0], tmp_path / "page.html", prediction=other)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.nii", "-o", "{d}/page.html"], "none.nii"),
        (["{i}", "-o", "{d}/page.txt"], ".html"),
        (["{i}", "-o", "{d}/none/page.html"], "page.html"),
        (["{i}", "-o", "{d}/page.html", "--prediction", "{i}"], "are no labels"),
    ],
)
def test_the_command_refuses_in_one_line(case, tmp_path, capsys, arguments, words):
    filled = [argument.replace("{i}", str(case[0])).replace("{d}", str(tmp_path)) for argument in arguments]
    assert cli.main(["view", *filled]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to open the page")
@pytest.mark.parametrize(
    ("options", "state", "viewer"),
    [
        (("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"), "ready", True),
        (("--disable-gpu", "--disable-3d-apis"), "picture only: this browser has no WebGL 2", True),
        (("--disable-gpu",), "picture only: no viewer in this page", False),
    ],
)
def test_a_browser_opens_the_page_offline(case, tmp_path, monkeypatch, options, state, viewer):
    if not viewer:
        monkeypatch.setattr(viewing, "_viewer", lambda: None)
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    write_page(case[0], page, case[1], case[2])
    quiet = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
    command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, "--disable-sync", f"--user-data-dir={tmp_path}/profile"]
    command += [*options, "--window-size=1000,700", "--virtual-time-budget=20000", f"--screenshot={shot}", "--dump-dom"]
    run = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=200, check=True)
    assert f'role="status">{state}</p>' in run.stdout
    # A blank page compresses to far less.
    assert shot.stat().st_size > 20_000
