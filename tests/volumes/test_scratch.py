"""Arrays on disk leave nothing behind and refuse a full disk before any work."""

import errno
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest

from vssm.volumes import VolumeError
from vssm.volumes.scratch import new_array


def test_an_array_on_disk_is_zeros_that_can_be_written_and_has_no_name(tmp_path):
    array = new_array((3, 4, 5), np.float32, tmp_path)
    assert isinstance(array, np.memmap)
    assert (array.shape, array.dtype) == ((3, 4, 5), np.float32)
    assert not array.any()
    array += 2
    assert array.sum() == 120
    assert not isinstance(new_array((3, 4, 5), np.float32), np.memmap)
    if os.name == "posix":
        assert list(tmp_path.iterdir()) == []


def test_a_disk_without_space_is_told_at_once(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    with pytest.raises(VolumeError, match="GB are free; free some space"):
        new_array((30, 4, 5), np.float32, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_a_disk_that_fills_while_space_is_reserved_is_told_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(VolumeError, match="No space left on device"):
        new_array((3, 4, 5), np.float32, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(VolumeError, match="none: cannot take"):
        new_array((3, 4, 5), np.float32, tmp_path / "none")
