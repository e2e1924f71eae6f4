"""The memory that is left is what the system and the container leave; nothing is refused where neither tells."""

import os

import pytest

from vssm import machine
from vssm.volumes import VolumeError, memory

GIGABYTE = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(available, limit, used, cached) sets the files of the kernel, in bytes; None leaves one out."""

    def write(available=None, limit=None, used=0, cached=0):
        monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(machine, "_CGROUP", tmp_path)
        if available is not None:
            kilobytes = available // 1024
            (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {kilobytes} kB\nHugePages_Total: 0\n")
        if limit is not None:
            (tmp_path / "memory.max").write_text(f"{limit}\n")
            (tmp_path / "memory.current").write_text(f"{used}\n")
            (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")

    return write


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"available": 8 * GIGABYTE}, 8 * GIGABYTE),
        ({"available": 8 * GIGABYTE, "limit": "max"}, 8 * GIGABYTE),
        ({"available": 8 * GIGABYTE, "limit": 5 * GIGABYTE, "used": 4 * GIGABYTE, "cached": GIGABYTE}, 2 * GIGABYTE),
        ({"available": GIGABYTE, "limit": 5 * GIGABYTE}, GIGABYTE),
        ({"available": GIGABYTE, "limit": GIGABYTE, "used": 2 * GIGABYTE}, 0),
    ],
    ids=["no container", "container without limit", "container", "container larger than the machine", "overdrawn"],
)
def test_the_smaller_of_machine_and_container_counts(system, files, expected):
    system(**files)
    assert machine.available_memory() == pytest.approx(expected, abs=1024)


def test_other_systems_count_their_physical_memory(system, monkeypatch):
    system()
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1}, raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get, raising=False)
    assert machine.available_memory() == 4_096_000


def test_a_system_that_does_not_tell_refuses_nothing(system, monkeypatch):
    system()
    monkeypatch.delattr(os, "sysconf_names", raising=False)
    assert machine.available_memory() is None
    memory.require_memory(10**18, "a.nii", "crop it")


def test_too_little_is_refused_with_both_figures(system):
    system(available=2 * GIGABYTE)
    memory.require_memory(GIGABYTE, "a.nii", "crop it")
    with pytest.raises(VolumeError, match=r"a.nii needs about 3.0 GB of memory and 2.0 GB are available; crop it"):
        memory.require_memory(3 * GIGABYTE, "a.nii", "crop it")
