"""The benchmark tool: what it writes, with ratios that follow from its times, and what it refuses."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import benchmark
import benchmark_networks
import benchmark_ops
import measuring

SMALL = dict(LENGTHS=(16, 64), LONG_SHAPE=(1, 2, 256, 2), ROUTE_SHAPES=((1, 4, 4, 1, 2),))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Sizes and times that take a second, and the number of threads put back."""
    for name, value in SMALL.items():
        monkeypatch.setattr(benchmark_ops, name, value)
    for module in (benchmark_ops, benchmark_networks, benchmark.benchmark_models):
        monkeypatch.setattr(module, "take_turns", lambda calls, device, **_: measuring.take_turns(calls, device, 0, 2))
    for name in ("streaming", "threads_gain"):
        original = getattr(benchmark_ops, name)
        monkeypatch.setattr(benchmark_ops, name, lambda device, _, f=original: f(device, (1, 2, 64, 1)))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_ops_are_timed_in_all_implementations_and_written_as_numbers_table_and_plot(tmp_path, capsys, native_cpu):
    arguments = ["ops", "--shape", "1,4,32,2", "--reference", "--device", "cpu", "--threads", "1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path / "figures" / "ops")]) == 0
    written = json.loads((tmp_path / "figures" / "ops.json").read_text())
    assert written["environment"]["threads"] == 1 and "ops --shape 1,4,32,2" in written["command"]
    rows = written["results"]["selective_scan"]
    assert [row["pass"] for row in rows] == ["forward", "forward + backward"]
    for row in rows:
        ratio = statistics.median(row["reference ms"]) / statistics.median(row["native ms"])
        assert float(row["reference / native"]) == pytest.approx(ratio, abs=0.006)
    assert [row["L"] for row in written["results"]["time against length"]] == [16, 64, 16, 64]
    assert (tmp_path / "figures" / "ops.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "figures" / "ops-time-against-length.png").stat().st_size > 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux")
def test_memory_is_that_of_the_call_alone():
    # 80 MB each: what is made before counts not, what the call makes does.
    peak = measuring.peak_memory(allocate, (20_000_000, 20_000_000), 1)
    assert 70e6 < peak < 130e6


def allocate(before, within):
    held = torch.ones(before)
    return lambda: held[:1] + torch.ones(within).sum()


def test_models_are_timed_beside_one_another(tmp_path, capsys):
    names = ["test_vit", "test_efficientnet"]
    assert benchmark.main(["models", *names, "--resolution", "160", "--batch", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("| inference | test_vit |") == 1 and out.count("| training step | test_efficientnet |") == 1


def test_networks_are_measured_against_the_first(tmp_path, monkeypatch):
    networks = {"one": lambda c: torch.nn.Conv3d(c, 4, 3), "two": lambda c: torch.nn.Conv3d(c, 4, 5)}
    monkeypatch.setattr(benchmark_networks, "NETWORKS", networks)
    # The process that measures memory would not see the networks of this test.
    peaks = {"one": 4_000_000_000, "two": 1_000_000_000}
    monkeypatch.setattr(benchmark_networks, "peak_memory", lambda make, arguments, threads: peaks[arguments[0]])
    arguments = ["networks", "--size", "8", "--channels", "2", "--device", "cpu", "--threads", "1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path / "networks")]) == 0
    speed, memory = json.loads((tmp_path / "networks.json").read_text())["results"].values()
    assert [row["network"] for row in speed] == [row["network"] for row in memory] == ["one", "two"]
    ratio = statistics.median(speed[1]["ms"]) / statistics.median(speed[0]["ms"])
    assert float(speed[1]["time / one"]) == pytest.approx(ratio, abs=0.006)
    assert [row["GB"] for row in memory] == ["4.000", "1.000"] and memory[1]["memory / one"] == "0.25"


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["ops", "--shape", "1,2,3"], "'1,2,3' is not batch,channels,length,states"),
        (["ops", "--threads", "0"], "'0' is not a whole number above 0"),
        (["models", "no_such_model"], "no model is called 'no_such_model'"),
        (["everything"], "everything"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, words, capsys):
    try:
        status = benchmark.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err
