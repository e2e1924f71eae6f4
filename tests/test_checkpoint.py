"""Official checkpoint files: what is read, what is refused, and how names are matched."""

import argparse
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vssm.checkpoint import load_official, read_checkpoint, remap, unwrap

WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


class Net(nn.Module):
    """A module with weights, statistics and an official naming of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.bn = nn.BatchNorm1d(2)

    def convert_official(self, state_dict):
        return remap(state_dict, [(r"^(encoder|decoder\.encoder)\.", ""), (r"^unused\.", None)])


def official() -> dict:
    statistics = {"bn.weight": 2.0, "bn.bias": 3.0, "bn.running_mean": 4.0, "bn.running_var": 5.0}
    state = {**WEIGHTS, **{key: torch.full((2,), value) for key, value in statistics.items()}}
    return {f"encoder.{key}": value for key, value in state.items()}


def same(got: dict, want: dict) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.fixture
def yacs(monkeypatch):
    """The class of yacs's configuration objects, importable only while the checkpoint is written."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        yield module.CfgNode


def test_a_file_with_a_yacs_configuration_is_read_without_yacs(tmp_path, yacs):
    config = yacs(MODEL=yacs(NAME="vssm", DEPTHS=[2, 2]), LR=1e-3)
    config.__dict__["__immutable__"] = True
    torch.save({"model": WEIGHTS, "config": config, "epoch": 3}, tmp_path / "a.pth")
    del sys.modules["yacs.config"], sys.modules["yacs"]
    assert same(read_checkpoint(tmp_path / "a.pth"), WEIGHTS)
    assert "yacs" not in sys.modules and "yacs.config" not in sys.modules


def test_a_file_with_an_argparse_namespace_is_read(tmp_path):
    torch.save(
        {"model": WEIGHTS, "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=1))}, tmp_path / "a.pth"
    )
    assert same(read_checkpoint(tmp_path / "a.pth"), WEIGHTS)


def test_a_file_with_logged_numpy_numbers_is_read(tmp_path):
    torch.save(
        {"network_weights": WEIGHTS, "logging": {"dice": [np.float32(0.5), np.float64(0.25)]}}, tmp_path / "a.pth"
    )
    assert same(read_checkpoint(str(tmp_path / "a.pth")), WEIGHTS)


def test_a_file_with_openmmlabs_logs_is_read_without_openmmlab(tmp_path, monkeypatch):
    """Its HistoryBuffer stores its own functions, so that the pickle holds calls of getattr."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        __module__, __qualname__ = module.__name__, "HistoryBuffer"

        def mean(self):
            raise AssertionError("called")

        mean.__qualname__, mean.__module__ = "HistoryBuffer.mean", module.__name__

        def __getstate__(self):
            return {"_log_history": np.arange(3.0), "statistics_methods": {"mean": HistoryBuffer.mean}}

    module.HistoryBuffer = HistoryBuffer
    logs = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": np.int64(7)}}
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            patch.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
        torch.save({"meta": {}, "state_dict": WEIGHTS, "message_hub": logs}, tmp_path / "epoch_12.pth")
    assert b"getattr" in (tmp_path / "epoch_12.pth").read_bytes()
    assert same(read_checkpoint(tmp_path / "epoch_12.pth"), WEIGHTS)
    assert "mmengine" not in sys.modules


def test_a_safetensors_file_is_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert same(read_checkpoint(tmp_path / "a.safetensors"), WEIGHTS)


def test_reading_leaves_torchs_own_allow_list_as_it_was(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "a.pth")
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_calls_a_function_is_refused_by_name_and_does_not_run(tmp_path, zipped):
    victim = tmp_path / "made.txt"
    attack = Attack(exec, f"open({str(victim)!r}, 'w')")
    torch.save({"model": WEIGHTS, "x": attack}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth names the global exec.*weights_only=False"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not victim.exists()


def test_a_stand_in_cannot_be_used_to_reach_a_refused_global(tmp_path):
    torch.save({"model": WEIGHTS, "x": argparse.Namespace(y=Attack(eval, "1"))}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"names the global eval"):
        read_checkpoint(tmp_path / "evil.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip", pickle.dumps({"a": 1}, 2)])
def test_a_damaged_file_is_one_sentence_with_its_name(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pth is damaged or not a checkpoint \([^\n]+\)$"):
        read_checkpoint(tmp_path / "bad.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_changed_bytes_never_give_another_error_than_the_one_with_the_name(tmp_path):
    path = tmp_path / "bad.pth"
    numbers = random.Random(0)
    for zipped in (True, False):
        torch.save({"model": WEIGHTS, "args": argparse.Namespace(a=[1])}, path, _use_new_zipfile_serialization=zipped)
        good = path.read_bytes()
        refused = 0
        for _ in range(150):
            bad = bytearray(good)
            bad[numbers.randrange(len(bad))] = numbers.randrange(256)
            path.write_bytes(bad)
            try:
                read_checkpoint(path)
            except ValueError as error:
                assert "bad.pth" in str(error)
                refused += 1
        assert refused > 20


def test_a_damaged_safetensors_file_is_one_sentence_with_its_name(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing here")
    with pytest.raises(ValueError, match=r"bad\.safetensors is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "bad.safetensors")


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "wrapper", ["model", "model_ema", "state_dict", "state_dict_ema", "model_state_dict", "network_weights"]
)
def test_trainers_wrappers_and_prefixes_are_taken_off(wrapper):
    assert same(
        unwrap({wrapper: {f"module.module.{key}": value for key, value in WEIGHTS.items()}, "epoch": 1}), WEIGHTS
    )
    assert same(unwrap({f"_orig_mod.module.{key}": value for key, value in WEIGHTS.items()}), WEIGHTS)


def test_averaged_weights_are_preferred():
    averaged = {key: value + 1 for key, value in WEIGHTS.items()}
    assert same(unwrap({"model": WEIGHTS, "model_ema": averaged}), averaged)


@pytest.mark.parametrize("wrong", [{}, [1, 2], {"epoch": 3}, {"model": {"a": 1.0}}, {1: torch.zeros(1)}])
def test_what_is_not_a_state_dict_is_refused(wrong):
    with pytest.raises(ValueError, match="a state dict"):
        unwrap(wrong)


def test_rules_apply_in_order_and_none_drops():
    state = {"layers.0.norm.weight": torch.ones(1), "layers.0.mask": torch.zeros(1), "head": torch.ones(2)}
    got = remap(state, [(r"^layers\.", "stages."), (r"^stages\.(\d+)\.norm", r"stages.\1.norm1"), (r"mask$", None)])
    assert list(got) == ["stages.0.norm1.weight", "head"]


def test_tied_tensors_are_merged_if_equal_and_refused_if_not():
    rules = [(r"^(a|b)\.", "c.")]
    assert list(remap({"a.w": torch.ones(2), "b.w": torch.ones(2)}, rules)) == ["c.w"]
    with pytest.raises(ValueError, match=r"a\.w and b\.w both stand for c\.w"):
        remap({"a.w": torch.ones(2), "b.w": torch.zeros(2)}, rules)
    with pytest.raises(ValueError, match=r"both stand for c\.w"):
        remap({"a.w": torch.ones(2), "b.w": torch.ones(2, 1)}, rules)


def test_official_weights_load_from_a_dict_and_from_a_file(tmp_path):
    state = official() | {"unused.x": torch.ones(1)} | {"decoder.encoder.fc.bias": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    for source in (state, {"model": state}, tmp_path / "a.pth", str(tmp_path / "a.pth")):
        net = Net()
        load_official(net, source)
        assert torch.equal(net.fc.weight, WEIGHTS["fc.weight"]) and net.bn.running_var.tolist() == [5.0, 5.0]


def test_only_the_batch_counter_may_be_missing():
    state = official()
    assert not any("num_batches_tracked" in key for key in state)
    del state["encoder.bn.running_mean"]
    with pytest.raises(ValueError, match=r"fit Net;.*Mismatches \(1\):\n  bn.running_mean \(2,\) is missing"):
        load_official(Net(), state)


def test_unmatched_names_and_shapes_are_listed_with_shapes():
    state = official() | {"other.weight": torch.ones(4, 5), "encoder.fc.weight": torch.ones(2, 7)}
    with pytest.raises(ValueError) as error:
        load_official(Net(), state)
    assert "other.weight (4, 5) is not in the model" in str(error.value)
    assert "fc.weight has shape (2, 7), the model needs (2, 3)" in str(error.value)


def test_only_the_first_ten_mismatches_are_listed():
    with pytest.raises(ValueError) as error:
        load_official(Net(), official() | {f"extra.{i}": torch.ones(1) for i in range(30)})
    assert "Mismatches (30)" in str(error.value) and "and 20 more" in str(error.value)
    assert str(error.value).count("is not in the model") == 10


def test_a_refused_checkpoint_changes_nothing():
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError):
        load_official(net, official() | {"extra": torch.ones(1)})
    assert same(net.state_dict(), before)


def test_a_module_without_an_official_naming_is_refused():
    with pytest.raises(ValueError, match="got Linear, which has no convert_official"):
        load_official(nn.Linear(1, 1), WEIGHTS)
