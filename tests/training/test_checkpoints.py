"""Checkpoints: complete or absent, read back exactly, refused when damaged; random states continue where they were."""

import os
import random

import numpy as np
import pytest
import torch

from vssm import atomic
from vssm.training.checkpoints import load_checkpoint, random_state, save_checkpoint, set_random_state


def draw():
    return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()


def test_every_generator_continues_where_it_was_also_through_a_file(tmp_path):
    # an odd number of normal numbers leaves one cached
    draw()
    save_checkpoint({"random": random_state()}, tmp_path / "a.pt")
    expected = [draw() for _ in range(3)]
    set_random_state(load_checkpoint(tmp_path / "a.pt")["random"])
    assert [draw() for _ in range(3)] == expected


def test_what_is_saved_is_what_is_loaded(tmp_path):
    state = {"weights": {"a": torch.arange(5.0)}, "list": [1, 2.5, None, "text"], "flag": True}
    save_checkpoint(state, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    torch.testing.assert_close(loaded["weights"]["a"], state["weights"]["a"], atol=0, rtol=0)
    assert (loaded["list"], loaded["flag"]) == (state["list"], True)


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint({"step": 1}, tmp_path / "a.pt")

    def no_space(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint({"step": 2}, tmp_path / "a.pt")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, -10])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, keep):
    path = tmp_path / "a.pt"
    save_checkpoint({"weights": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.pt: is damaged") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_would_run_code_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"f": os.system}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path / "code.pt")
