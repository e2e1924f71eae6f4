"""The evaluation tool: its rows, its sizes, its one-line messages."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from classification.pictures import write_pictures
from families import family
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from vssm.classification.results import read_results
from vssm.classification.trained import Trained, write_trained
from vssm.hashing import file_sha256

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import evaluate_classifier

NUMBERS = ImageNetInfo().label_names()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """vssm's models with few, narrow layers."""
    build = timm.create_model

    def create(name, **arguments):
        arch = name.partition(".")[0]
        return build(name, **({**family(arch).small, **arguments} if arch.startswith(("vmamba", "vim")) else arguments))

    monkeypatch.setattr(timm, "create_model", create)


@pytest.fixture
def weights(tmp_path):
    """weights(name, **arguments) -> a file for that model, whose classifier calls everything class 7."""

    def write(name: str, **arguments) -> Path:
        torch.manual_seed(0)
        model = timm.create_model(name, **arguments)
        with torch.no_grad():
            # ascending, so that the order of any part of the classes is known too; 7 is above all
            head = model.get_classifier()
            head.weight.zero_()
            head.bias.copy_(torch.arange(float(len(head.bias))) / 1000)
            head.bias[min(7, len(head.bias) - 1)] = 5.0
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return write


@pytest.fixture
def run(tmp_path, capsys):
    """run(*arguments) -> (status, standard output, standard error, rows written)."""

    def call(*arguments):
        output = tmp_path / "results.csv"
        status = evaluate_classifier.main([*map(str, arguments), "--output", str(output), "--workers", "0"])
        return status, *capsys.readouterr(), read_results(output)

    return call


def test_rows_of_imagenet_and_its_relatives_at_several_sizes(run, weights, tmp_path):
    val = write_pictures(tmp_path / "val", {NUMBERS[7]: [10, 20, 30], NUMBERS[998]: [40]})
    part = write_pictures(tmp_path / "a", {NUMBERS[3]: [10], NUMBERS[5]: [20, 30]})
    file = weights("vmamba_tiny")
    arguments = ("--weights", file, "--imagenet-val", val, "--imagenet-a", part, "--sizes", 64, 32, "--batch-size", 2)
    status, out, err, rows = run("vmamba_tiny", *arguments)
    assert (status, err) == (0, "") and "top-1  75.00 %" in out and "results.csv" in out
    found = {(row.data, row.size): (row.images, row.top1, row.top5) for row in rows}
    # of the part only the classes 3 and 5 compete, and 5 has the higher logit
    a, v = (3, pytest.approx(66.667), 100), (4, 75, 100)
    assert found == {(name, size): want for name, want in (("imagenet-a", a), ("imagenet-val", v)) for size in (32, 64)}
    assert {row.sha256 for row in rows} == {file_sha256(file)} and {row.weights for row in rows} == {"vmamba_tiny"}
    assert {(row.precision, row.interpolation, row.crop_pct) for row in rows} == {("float32", "bicubic", 0.875)}


def test_positions_are_resampled_for_every_size(run, weights, tmp_path):
    val = write_pictures(tmp_path / "val", {NUMBERS[7]: [10]})
    rows = run("vim_tiny", "--weights", weights("vim_tiny"), "--imagenet-val", val, "--sizes", 192, 224, 384)[-1]
    assert [(row.size, row.top1) for row in rows] == [(192, 100), (224, 100), (384, 100)]


def test_a_peer_of_timm_that_takes_one_size_is_made_anew_for_each(run, weights, tmp_path):
    val = write_pictures(tmp_path / "val", {NUMBERS[7]: [10]})
    file = weights("test_vit")
    status, _, _, rows = run("test_vit", "--weights", file, "--imagenet-val", val, "--sizes", 160, 192)
    assert status == 0 and [(row.size, row.top1) for row in rows] == [(160, 100), (192, 100)]


def test_a_folder_of_other_classes_under_autocast(run, weights, tmp_path):
    pets = write_pictures(tmp_path / "pets", {"cat": [1], "dog": [2], "newt": [3, 4]})
    file = weights("vmamba_tiny", num_classes=3)
    arguments = ("--num-classes", 3, "--folder", pets, "--amp", "bfloat16", "--channels-last", "--crop-pct", 1.0)
    status, _, _, rows = run("vmamba_tiny", "--weights", file, *arguments)
    assert status == 0
    assert (rows[0].data, rows[0].top1, rows[0].precision, rows[0].crop_pct) == ("pets", 50, "bfloat16", 1.0)


def test_a_file_of_the_trainer_says_what_it_holds(run, tmp_path):
    arguments = {"num_classes": 3}
    network = timm.create_model("vmamba_tiny", **arguments)
    facts = Trained("vmamba_tiny", arguments, ["a", "b", "c"], {}, 50.0, 1)
    write_trained(tmp_path / "best.safetensors", network, facts)
    write_pictures(tmp_path / "pictures", {name: [10, 200] for name in "abc"})
    given = "--weights", tmp_path / "best.safetensors", "--folder", tmp_path / "pictures", "--sizes", "32"
    status, _, _, rows = run("vmamba_tiny", *given)
    assert status == 0
    assert [(row.data, row.images) for row in rows] == [("pictures", 6)]
    status, _, err, _ = run("vmamba_small", *given)
    assert status == 2
    assert "holds a vmamba_tiny, not a vmamba_small" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vmamba_tny", "--folder", "."), "no model is called vmamba_tny"),
        (("vmamba_tiny",), "at least one folder"),
        (("vmamba_tiny", "--weights", "none.pth", "--folder", "."), "none.pth"),
        (("test_vit", "--weights", __file__, "--folder", "."), "test_evaluate_classifier.py does not fit test_vit"),
        (("vmamba_tiny", "--weights", __file__, "--folder", "."), "is damaged or not a checkpoint"),
        (("groupmamba_tiny", "--folder", "."), "no direct download"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run, arguments, words, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    status, out, err, rows = run(*arguments)
    assert status == 2 and words in err and err.count("\n") == 1 and out == "" and rows == []


def test_a_wrong_folder_and_a_wrong_number_of_classes_are_one_line(run, weights, tmp_path):
    file = weights("vmamba_tiny", num_classes=3)
    for option, words in (("--imagenet-r", "needs a model of 1000 classes, this one has 3"), ("--folder", "no such")):
        status, _, err, _ = run("vmamba_tiny", "--weights", file, "--num-classes", 3, option, tmp_path / "none")
        assert status == 2 and words in err and err.count("\n") == 1


def test_rows_that_are_done_are_kept_when_a_later_one_fails(run, weights, tmp_path):
    val = write_pictures(tmp_path / "val", {NUMBERS[7]: [10]})
    status, _, err, rows = run(
        "vmamba_tiny", "--weights", weights("vmamba_tiny"), "--imagenet-val", val, "--imagenet-r", tmp_path / "none"
    )
    assert status == 2 and "no such folder" in err and [row.data for row in rows] == ["imagenet-val"]


def test_a_picture_that_cannot_be_read_is_one_line_with_its_name(weights, tmp_path, capsys):
    val = write_pictures(tmp_path / "val", {NUMBERS[7]: [10, 20]})
    (val / NUMBERS[7] / "1.png").write_bytes(b"no picture")
    arguments = ["vmamba_tiny", "--weights", weights("vmamba_tiny"), "--imagenet-val", val, "--workers", 1]
    assert evaluate_classifier.main([*map(str, arguments), "--output", str(tmp_path / "r.csv")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line
    assert line.startswith(f"evaluate_classifier.py: {val / NUMBERS[7] / '1.png'} cannot be read as a picture")


def test_a_device_that_is_not_there_is_one_line(capsys):
    for device in ("cuda:77", "abacus"):
        with pytest.raises(SystemExit) as caught:
            evaluate_classifier.main(["vmamba_tiny", "--folder", ".", "--device", device])
        assert caught.value.code == 2 and f"'{device}' cannot be used" in capsys.readouterr().err


def test_weights_that_are_not_finite_end_with_status_1(run, weights, tmp_path):
    val = write_pictures(tmp_path / "val", {NUMBERS[7]: [10]})
    model = timm.create_model("vmamba_tiny")
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    save_file(model.state_dict(), tmp_path / "nan.safetensors")
    status, _, err, rows = run("vmamba_tiny", "--weights", tmp_path / "nan.safetensors", "--imagenet-val", val)
    assert status == 1 and "not finite" in err and rows == []


def test_the_help_has_examples():
    command = [sys.executable, evaluate_classifier.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--imagenet-val imagenet/val --sizes 192 224" in done.stdout
