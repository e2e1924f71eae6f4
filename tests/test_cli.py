"""The command line: results on standard output, one line on standard error and status 2 for what cannot be used."""

import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from volumes.samples import write_bundle

import vssm
from vssm import cli
from vssm.ops import backends

COMMANDS = ("info", "list", "segment", "evaluate", "view", "classify", "explain", "zoo")


def in_new_process(*arguments, **options):
    command = [sys.executable, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **options)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "tiny")


@pytest.fixture
def scan(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (12, 11, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.5, 2, 2.5, 1])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def small_models(monkeypatch):
    """vmamba models with one narrow block per stage."""
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: build(name, depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)))


def test_version_is_the_packages(run):
    assert run("--version") == (0, f"vssm {vssm.__version__}\n", "")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_every_help_has_an_example(run, command):
    status, out, err = run(*command, "--help")
    assert status == 0
    assert "example: vssm" in out
    assert err == ""


def test_segments_help_says_what_it_is_and_that_results_are_replaced(run):
    text = " ".join(run("segment", "--help")[1].split())
    assert "not a medical device" in text
    assert "replaced if it exists" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "arguments are required: COMMAND"),
        (("park",), "invalid choice: 'park'"),
        (("zoo",), "arguments are required: ACTION"),
        (("list", "a", "b"), "unrecognized arguments: b"),
        (("list", "--patt"), "unrecognized arguments: --patt"),
        (("segment",), "arguments are required: IMAGE, -o/--output"),
        (("segment", "a.nii"), "arguments are required: -o/--output"),
        (("segment", "a.nii", "-o", "b.nii", "--overlap", "much"), "invalid float value: 'much'"),
        (("classify",), "arguments are required: PICTURE"),
        (("classify", "a.png", "--topk", "five"), "invalid int value: 'five'"),
        (("classify", "a.png", "--weights", "w", "--random-weights"), "not allowed with argument --weights"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line_that_points_to_the_help(refused, arguments, words):
    line = refused(*arguments)
    assert words in line
    assert "--help" in line


def test_python_m_vssm_is_the_command():
    done = in_new_process("-m", "vssm", "--version", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vssm {vssm.__version__}\n", "")


def test_the_medical_packages_are_imported_only_by_commands_that_need_them():
    show = "sys.exit({'monai', 'nibabel', 'matplotlib'} & sys.modules.keys())"
    code = f"import sys, vssm.cli; vssm.cli.main(['info']); {show}"
    done = in_new_process("-c", code, stdout=subprocess.DEVNULL)
    assert done.stderr == "set()\n"


@pytest.mark.parametrize("missing", ["monai", "nibabel", "matplotlib"])
def test_a_missing_medical_package_is_named_with_the_command_that_installs_it(refused, tmp_path, monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith("vssm.volumes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    line = refused("segment", "a.nii", "-o", tmp_path / "out.nii", "--overlay", tmp_path / "out.png")
    assert line == f'vssm segment: {missing} is not installed; run pip install "vssm[medical]"\n'


@pytest.mark.skipif(os.name == "nt", reason="Windows has no broken pipes of this kind")
def test_a_reader_that_stops_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = in_new_process("-m", "vssm", "list", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interruption_is_reported_as_such(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "model_names", interrupt)
    assert run("list") == (130, "", "vssm list: interrupted\n")


def test_a_fault_of_the_program_is_not_disguised_as_wrong_input(run, monkeypatch):
    def fault(*_):
        raise ValueError("a fault")

    monkeypatch.setattr(cli.info, "model_names", fault)
    with pytest.raises(ValueError, match="a fault"):
        run("list")


def test_info_names_versions_and_every_op_on_every_device(run):
    status, out, err = run("info")
    assert (status, err) == (0, "")
    for name, version in (
        ("vssm", vssm.__version__),
        ("torch", torch.__version__.split("+")[0]),
        ("timm", timm.__version__),
    ):
        assert any(line.split()[0] == name and version in line for line in out.splitlines())
    rows = backends.status()
    assert rows
    for row in rows:
        (line,) = (line for line in out.splitlines() if line.startswith(f"{row.op} ") and f" {row.device} " in line)
        assert f" {row.kernel}" in line
        assert row.reason in line


def test_list_shows_every_model_with_its_size(run):
    status, out, err = run("list")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert {"vmamba_tiny", "vmamba_base", "vmambav0_small", "UMambaBot", "UMambaEnc"} <= lines.keys()
    assert not {"resnet18", "vit_base_patch16_224"} & lines.keys()
    # 30.2 M parameters, as the paper counts them
    assert "30.2 M" in lines["vmamba_tiny"]
    assert "3x224x224" in lines["vmamba_tiny"]


@pytest.mark.parametrize("pattern", ["vmambav0_*", "MAMBAV0", "v0_"])
def test_list_takes_part_of_a_name_or_a_pattern(run, pattern):
    names = [line.split()[0] for line in run("list", pattern)[1].splitlines()[1:]]
    assert names == ["vmambav0_base", "vmambav0_small", "vmambav0_tiny"]


def test_list_without_a_match_says_so(refused):
    assert "nothing matches 'nonesuch'" in refused("list", "nonesuch")


def test_segment_writes_the_labels_and_prints_voxels_and_millilitres(run, scan, bundle, tmp_path):
    out = tmp_path / "out.nii.gz"
    status, printed, err = run("segment", scan, "-o", out, "--bundle", bundle, "--overlay", tmp_path / "out.png")
    assert status == 0
    labels = np.asarray(nibabel.load(out).dataobj)
    for label, name in ((1, "grey matter"), (2, "white matter")):
        count = int((labels == label).sum())
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{label} "))
        assert line.split() == [str(label), *name.split(), str(count), f"{count * 7.5 / 1000:.1f}"]
    assert f"wrote {out}" in printed
    assert (tmp_path / "out.png").exists()
    # what is unusual about the volume, the warning about its use, and no progress bar: this is no terminal
    assert [line.startswith("note: ") for line in err.splitlines()] == [True] * 3
    assert err.count("not a medical device") == 1


def test_quiet_prints_warnings_only(run, scan, bundle, tmp_path):
    status, printed, err = run("segment", scan, "-o", tmp_path / "out.nii", "--bundle", bundle, "--quiet")
    assert (status, printed) == (0, "")
    assert len(err.splitlines()) == 2
    assert "not a medical device" not in err


@pytest.mark.parametrize("quiet, shown", [([], True), (["--quiet"], False)], ids=["terminal", "quiet"])
def test_a_terminal_shows_progress_unless_quiet(run, scan, bundle, tmp_path, monkeypatch, quiet, shown):
    monkeypatch.setattr(cli.volumes, "is_terminal", lambda: True)
    status, _, err = run("segment", scan, "-o", tmp_path / "out.nii", "--bundle", bundle, *quiet)
    assert status == 0
    assert ("%|" in err) == shown


def test_segment_refuses_in_one_line_and_writes_nothing(refused, scan, bundle, tmp_path):
    out = tmp_path / "out.nii.gz"
    good = {"image": scan, "-o": out, "--bundle": bundle}
    truncated, text = tmp_path / "cut.nii.gz", tmp_path / "text.nii"
    truncated.write_bytes(scan.read_bytes()[:-20])
    text.write_text("hello")
    cases = [
        ({"image": tmp_path / "none.nii.gz"}, "no such file"),
        ({"image": tmp_path}, "is a folder"),
        ({"image": tmp_path / ("x" * 5000 + ".nii")}, "cannot be read"),
        ({"-o": tmp_path / ("x" * 5000 + ".nii")}, "cannot be written"),
        ({"--bundle": "x" * 5000}, "cannot be looked for"),
        ({"image": truncated}, "cut.nii.gz"),
        ({"image": text}, "is not a NIfTI file"),
        ({"-o": tmp_path / "out.png"}, "must be named"),
        ({"-o": tmp_path / "none" / "out.nii"}, "does not exist"),
        ({"-o": scan}, "is the input itself"),
        ({"--bundle": "lungs"}, "no such bundle"),
        ({"--device": "tpu"}, "device 'tpu'"),
        ({"--overlap": "1.5"}, "overlap must be"),
        ({"--overlay": tmp_path / "out.bmp"}, "must be named .png"),
    ]
    for changes, words in cases:
        options = good | changes
        image = options.pop("image")
        line = refused("segment", image, *(part for option in options.items() for part in option))
        assert line.startswith("vssm segment: ")
        assert words in line
        assert not out.exists()


def test_a_folder_is_segmented_and_run_again_goes_on(run, scan, bundle, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("a", "b"):
        (scans / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    options = ("-o", out, "--bundle", bundle, "--save-probabilities", "--min-size", "0.01", "--mirror", "x")
    status, printed, err = run("segment", scans, *options)
    assert status == 0
    assert sorted(os.listdir(out)) == ["a.nii.gz", "a.npz", "b.nii.gz", "b.npz"]
    for case in ("a", "b"):
        labels = np.asarray(nibabel.load(out / f"{case}.nii.gz").dataobj)
        rows = [line.split() for line in printed.splitlines() if line.startswith(f"{case} ")]
        assert [int(row[-2]) for row in rows] == [(labels == label).sum() for label in (1, 2)]
    assert f"wrote 2 of 2 cases to {out}, skipped 0" in printed
    assert "cleaning up set" in err
    (out / "a.nii.gz").unlink()
    (scans / "c.nii.gz").write_bytes(scan.read_bytes()[:-30])
    status, printed, err = run("segment", scans, *options)
    assert status == 2
    assert f"wrote 1 of 3 cases to {out}, skipped 1" in printed
    lines = err.splitlines()
    assert f"note: b: skipped, {out / 'b.nii.gz'} is complete" in lines
    assert any(line.startswith(f"note: c: {scans / 'c.nii.gz'}: ") for line in lines)
    assert lines[-1] == "vssm segment: 1 of 3 cases could not be segmented (see above): c"
    assert sorted(os.listdir(out)) == ["a.nii.gz", "a.npz", "b.nii.gz", "b.npz"]


def test_folds_channels_and_probabilities_are_options_of_segment(run, refused, scan, bundle, tmp_path):
    out, second = tmp_path / "out.nii.gz", write_bundle(tmp_path / "second", seed=1)
    two = write_bundle(tmp_path / "two", channels=2)
    status, printed, _ = run(
        "segment", scan, "-o", out, "--bundle", bundle, "--bundle", second, "--save-probabilities", "--keep-largest",
        "--patch-size", 8, 8, 8,
    )  # fmt: skip
    assert status == 0
    assert f"wrote {out} and {tmp_path / 'out.npz'} in" in printed
    assert run("segment", scan, scan, "-o", out, "--bundle", two)[0] == 0
    assert "takes 1 image(s) of a subject, got 2" in refused("segment", scan, scan, "-o", out, "--bundle", bundle)


def test_a_folder_is_refused_where_a_file_is_due(refused, scan, bundle, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for arguments, words in (
        ((scans, "-o", tmp_path / "out.nii.gz"), "its results go into a folder too"),
        ((scans, scan, "-o", tmp_path / "out"), "give one folder"),
        ((scans, "-o", tmp_path / "out", "--overlay", tmp_path / "a.png"), "--overlay draws one case"),
        ((scans, "-o", tmp_path / "out"), "holds no .nii or .nii.gz file"),
        ((scan, "-o", tmp_path / "out.nii", "--min-size", "-1"), "smallest size must be"),
        ((scan, "-o", tmp_path / "out.nii", "--patch-size", "0", "16", "16"), "patch size must be three positive"),
    ):
        assert words in refused("segment", *arguments, "--bundle", bundle)
    assert not (tmp_path / "out").exists()


def test_errors_that_other_libraries_word_in_several_lines_are_one_line(refused, scan, bundle, tmp_path):
    save_file({"weight": torch.zeros(1)}, bundle / "models" / "model.safetensors")
    line = refused("segment", scan, "-o", tmp_path / "out.nii", "--bundle", bundle)
    assert "model.safetensors" in line


def test_classify_prints_the_five_most_probable_classes(run, picture, small_models):
    torch.manual_seed(0)
    status, out, err = run("classify", picture, "--random-weights")
    assert status == 0
    assert "mean nothing" in err
    rows = [line.split(" %  ") for line in out.splitlines()]
    assert len(rows) == 5
    percent = [float(row[0]) for row in rows]
    assert percent == sorted(percent, reverse=True)
    names = set(timm.data.ImageNetInfo().label_descriptions())
    assert all(row[1] in names for row in rows)


def test_classify_uses_the_weights_it_is_given(run, picture, small_models, tmp_path):
    model = timm.create_model("vmamba_tiny")
    with torch.no_grad():
        model.head.fc.weight.zero_()
        model.head.fc.bias.zero_()
        model.head.fc.bias[1] = 50.0
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    status, out, err = run("classify", picture, "--weights", tmp_path / "weights.safetensors", "--topk", "1")
    assert (status, err) == (0, "")
    assert out.startswith("100.0 %  goldfish")


def test_classify_refuses_to_guess_without_weights(refused, picture):
    line = refused("classify", picture)
    assert "vssm zoo get vmamba_tiny.s1l8_in1k" in line
    assert "--weights FILE" in line
    assert "--random-weights" in line


def test_classify_refuses_in_one_line(refused, picture, tmp_path, small_models):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:300])
    (tmp_path / "weights.pth").write_text("hello")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    cases = [
        ((tmp_path / "none.png", "--random-weights"), "no such file"),
        ((tmp_path, "--random-weights"), "is not a picture"),
        ((tmp_path / "text.png", "--random-weights"), "is not a picture"),
        ((tmp_path / "cut.png", "--random-weights"), "is not a picture"),
        ((picture, "--random-weights", "--model", "vmamba_tinny"), "did you mean vmamba_tiny?"),
        ((picture, "--random-weights", "--model", "resnet18"), "no model is called resnet18"),
        ((picture, "--random-weights", "--topk", "0"), "--topk must be between 1 and 1000"),
        ((picture, "--weights", tmp_path / "none.pth"), "none.pth"),
        ((picture, "--weights", tmp_path / "weights.pth"), "weights.pth"),
        ((picture, "--weights", tmp_path / "other.pth"), "does not fit"),
    ]
    for arguments, words in cases:
        assert words in refused("classify", *arguments)


def test_explain_draws_attention_and_receptive_field(run, picture, small_models, tmp_path):
    torch.manual_seed(0)
    out = tmp_path / "looks.png"
    status, printed, err = run("explain", picture, "-o", out, "--random-weights", "--point", "0.2", "0.7")
    assert status == 0 and str(out) in printed and "mean nothing" in err
    with Image.open(out) as drawn:
        # Three panels side by side, drawn in colour.
        assert drawn.width > 2.5 * drawn.height
        assert np.ptp(np.asarray(drawn.convert("RGB")).astype(int), axis=2).max() > 100
    assert [path.name for path in tmp_path.iterdir() if "looks" in path.name] == ["looks.png"]


def test_explain_refuses_in_one_line(refused, picture, tmp_path, small_models):
    good = ("-o", tmp_path / "out.png", "--random-weights")
    cases = [
        ((picture, *good, "--point", "0.5", "1.0"), "--point takes two fractions from 0 to below 1, got 0.5 1"),
        ((picture, "-o", tmp_path / "out.jpg", "--random-weights"), "must name a .png file"),
        ((picture, "-o", tmp_path / "none" / "out.png", "--random-weights"), "in a folder that exists"),
        ((tmp_path / "none.png", *good), "no such file"),
        ((picture, "-o", tmp_path / "out.png"), "--random-weights"),
    ]
    for arguments, words in cases:
        assert words in refused("explain", *arguments)
    assert not (tmp_path / "out.png").exists()
