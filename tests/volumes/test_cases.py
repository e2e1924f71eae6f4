"""Which files are one case."""

import os

import pytest

from vssm.volumes import VolumeError
from vssm.volumes.cases import find_cases


@pytest.fixture
def folder(tmp_path):
    """folder(*names) -> a folder with empty files of these names."""

    def make(*names):
        for name in names:
            (tmp_path / name).touch()
        return tmp_path

    return make


def names(cases):
    return {case.name: [path.name for path in case.images] for case in cases}


def test_of_one_channel_every_volume_is_a_case(folder):
    path = folder("b.nii", "a.NII.gz", "notes.txt", ".hidden.nii", "c.v2.nii.gz", "s_2024.nii", "s_2025.nii")
    (path / "sub").mkdir()
    (path / "sub" / "d.nii").touch()
    assert names(find_cases(path, 1)) == {
        "a": ["a.NII.gz"], "b": ["b.nii"], "c.v2": ["c.v2.nii.gz"], "s_2024": ["s_2024.nii"], "s_2025": ["s_2025.nii"],
    }  # fmt: skip
    assert list(names(find_cases(path, 1))) == sorted(names(find_cases(path, 1)))


def test_channels_are_joined_in_their_order(folder):
    path = folder("a_0001.nii.gz", "a_0000.nii.gz", "b_1_0000.nii", "b_1_0001.nii")
    assert names(find_cases(path, 2)) == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"], "b_1": ["b_1_0000.nii", "b_1_0001.nii"],
    }  # fmt: skip


def test_one_channel_may_be_numbered(folder):
    assert names(find_cases(folder("a_0000.nii", "b.nii"), 1)) == {"a": ["a_0000.nii"], "b": ["b.nii"]}


@pytest.mark.parametrize(
    "files, channels, words",
    [
        (["a_0000.nii", "a_0001.nii"], 1, r"case a must have 1 channel \(a_0000\), got a_0000.nii, a_0001.nii"),
        (["a_0000.nii", "a_0001.nii", "b_0000.nii"], 2, r"case b must have 2 channels \(b_0000, b_0001\), got b_0000"),
        (["a.nii"], 2, "case a must have 2 channels"),
        (["a_0000.nii", "a_0001.nii", "a_0002.nii"], 2, "case a must have 2 channels"),
        (["a_0001.nii", "a_0002.nii"], 2, "case a must have 2 channels"),
        (["a.nii", "a.nii.gz"], 1, "a.nii.gz: is the same case as a.nii"),
        (["a_0000.nii", "a.nii"], 1, "is the same case as"),
        (["a.txt"], 1, "holds no .nii or .nii.gz file"),
    ],
)
def test_what_does_not_fit_the_network_is_one_sentence(folder, files, channels, words):
    with pytest.raises(VolumeError, match=words):
        find_cases(folder(*files), channels)


def test_a_folder_that_is_not_there_or_may_not_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(VolumeError, match="none: cannot be read"):
        find_cases(tmp_path / "none", 1)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(VolumeError, match="Permission denied"):
        find_cases(tmp_path, 1)
