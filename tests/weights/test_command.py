"""`vssm zoo`: what is known, files fetched and added, converted, verified."""

import argparse
import shutil
from dataclasses import replace

import numpy as np
import parity
import pytest
import timm
import torch
from classification.pictures import write_pictures
from official import load_golden, official_state
from safetensors import safe_open
from serving import breaks_after
from timm.data import ImageNetInfo

from vssm import networks, zoo
from vssm.checkpoint import load_official
from vssm.classification.results import read_results
from vssm.hashing import file_sha256
from vssm.weights.verifying import parity_input, verify

TINY = "vmamba_tiny.s1l8_in1k"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> dict:
    return load_golden("vmamba_tiny")


@pytest.fixture(scope="module")
def official_file(golden, tmp_path_factory):
    """What VMamba's trainer writes, with the parity weights."""
    path = tmp_path_factory.mktemp("official") / "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    torch.save({"model": official_state(golden), "optimizer": {}, "config": argparse.Namespace(NAME="vssm")}, path)
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of kept files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def rows(monkeypatch):
    """rows(name, **changes) replaces facts of a row."""
    published = dict(zoo.published())

    def change(name, **changes):
        published[name] = replace(published[name], **changes)

    def some(task=None):
        return {name: facts for name, facts in published.items() if task in (None, facts.task)}

    monkeypatch.setattr(zoo, "published", some)
    return change


def is_golden(logits: torch.Tensor, golden: dict) -> bool:
    return parity.relative_error(logits.numpy(), golden["outputs"]["logits"]) <= TOLERANCE


def logits_of(model: torch.nn.Module, golden: dict) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(parity.fill_input(golden["input"])))


def test_the_parity_input_is_the_recorded_ones():
    for shape in ((1, 3, 8, 8), (2, 1, 5)):
        assert np.array_equal(parity_input(shape).numpy(), parity.fill_input(shape))


def test_all_rows_are_listed_and_tasks_and_patterns_narrow_them(run):
    status, out, _ = run("zoo", "list")
    assert status == 0 and all(f"\n{name} " in out for name in zoo.published())
    out = run("zoo", "list", "upernet_vssd*", "--task", "segmentation")[1]
    assert len(out.splitlines()) == 3 and "45.6 (ADE20K mIoU, single scale, %)" in out
    assert "by hand" in run("zoo", "list", "groupmamba_tiny")[1] and " download" in out


def test_show_says_all_that_is_known_and_what_is_not(run):
    out = run("zoo", "show", "vmamba_tiny")[1]
    facts = zoo.published()[TINY]
    for part in (
        TINY,
        facts.url,
        facts.file_name,
        "MIT",
        "82.6",
        "30M",
        "4.9",
        "SHA-256",
        "not published",
        facts.paper,
    ):
        assert part in out
    _, out, err = run("zoo", "show", "lbvim_528.in1k")
    assert "its name is not stated" in out and "vssm zoo add lbvim_528.in1k FILE" in err


def test_get_downloads_once_and_prints_path_and_hash(run, server, rows, folder):
    rows(TINY, url=f"{server.address}/w.pth", file="")
    server.files["w.pth"] = b"weights"
    server.script.append(breaks_after(3))
    for _ in range(2):
        status, out, err = run("zoo", "get", TINY)
        assert (status, out.split()) == (0, [TINY, str(folder / "w.pth"), "sha256", file_sha256(folder / "w.pth")])
        assert "licence of these weights: MIT" in err
    assert server.ranges == ["", "bytes=3-"]
    assert " kept" in run("zoo", "list", TINY)[1] and str(folder / "w.pth") in run("zoo", "show", TINY)[1]


def test_get_takes_another_folder(run, server, rows, folder, tmp_path):
    rows(TINY, url=f"{server.address}/w.pth")
    server.files["w.pth"] = b"weights"
    assert run("zoo", "get", TINY, "--folder", tmp_path / "mine")[0] == 0
    assert (tmp_path / "mine" / "w.pth").exists() and not folder.exists()


def test_get_without_a_network_prints_the_steps(refused, rows, folder):
    rows(TINY, url="http://127.0.0.1:9/w.pth")
    line = refused("zoo", "get", TINY)
    assert "http://127.0.0.1:9/w.pth" in line and f"save it as {folder / 'w.pth'}" in line
    line = refused("zoo", "get", "mhsvmunet_4h.isic18")
    assert "download best_4h.pth, then run: vssm zoo add mhsvmunet_4h.isic18 FILE" in line


def test_a_wrong_name_has_a_hint_and_nothing_is_fetched(refused, server, rows):
    rows(TINY, url=f"{server.address}/w.pth")
    assert "did you mean vmamba_tiny.s1l8_in1k" in refused("zoo", "get", TINY, "vmamba_tiny.s1l8")
    assert "vssd_tiny.in1k or vssd_tiny.mesa_in1k" in refused("zoo", "show", "vssd_tiny")
    assert server.ranges == []


def test_a_file_that_was_added_is_loaded_by_create_model(run, refused, official_file, golden, tmp_path):
    assert "does not fit VSSD" in refused("zoo", "add", "vssd_micro.in1k", official_file)
    assert "none.pth" in refused("zoo", "add", TINY, tmp_path / "none.pth")
    shutil.copy(official_file, tmp_path / "download (1).pth")
    assert run("zoo", "add", TINY, tmp_path / "download (1).pth")[0] == 0
    assert is_golden(logits_of(timm.create_model("vmamba_tiny", pretrained=True), golden), golden)


def test_a_converted_file_gives_the_same_logits_and_says_where_it_comes_from(run, official_file, golden, tmp_path):
    output = tmp_path / "tiny.safetensors"
    status, out, _ = run("zoo", "convert", TINY, "--file", official_file, "-o", output)
    assert status == 0 and f"wrote {output}" in out
    with safe_open(output, "pt") as stream:
        metadata, names = stream.metadata(), set(stream.keys())
    assert metadata["original_sha256"] == file_sha256(official_file) and metadata["weights"] == TINY
    facts = zoo.published()[TINY]
    assert (metadata["source"], metadata["commit"], metadata["weights_licence"]) == (facts.url, "2ed52ea", "MIT")
    overlay = {"file": str(output)}
    model = timm.create_model("vmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert names == set(model.state_dict())
    assert is_golden(logits_of(model, golden), golden)
    # What was converted can be verified and converted again.
    assert run("zoo", "convert", TINY, "--file", output, "-o", tmp_path / "again.safetensors")[0] == 0
    assert run("zoo", "verify", TINY, "--file", output)[0] == 0


def test_convert_refuses_other_files_and_leaves_what_was_there(refused, official_file, tmp_path):
    output = tmp_path / "tiny.safetensors"
    output.write_text("precious")
    assert "does not fit VSSD" in refused("zoo", "convert", "vssd_micro.in1k", "--file", official_file, "-o", output)
    assert "must end in .safetensors" in refused(
        "zoo", "convert", TINY, "--file", official_file, "-o", tmp_path / "x.pt"
    )
    assert output.read_text() == "precious" and sorted(tmp_path.glob(".*")) == []


def test_verify_prints_numbers_of_the_file(run, official_file, tmp_path):
    status, out, _ = run("zoo", "verify", TINY, "--file", official_file)
    assert status == 0
    model = timm.create_model("vmamba_tiny")
    load_official(model, official_file)
    with torch.inference_mode():
        logits = model.eval()(parity_input((1, 3, 224, 224)))
    for part in (
        file_sha256(official_file),
        f"{official_file.stat().st_size} bytes",
        "read from   model; published: model",
        f"all {len(model.state_dict())} tensors fit vmamba_tiny",
        f"1 x 1000: mean {logits.mean():.6g}, standard deviation {logits.std():.6g}",
        f"first {logits[0, 0]:.5g} {logits[0, 1]:.5g}",
    ):
        assert part in out


def test_the_outputs_that_verify_shows_are_those_of_the_official_code(tmp_path):
    recorded = load_golden("vim_tiny_224")
    torch.save({"model": official_state(recorded), "args": argparse.Namespace(lr=1e-3)}, tmp_path / "vim.pth")
    found = verify(zoo.published()["vim_tiny.in1k"], tmp_path / "vim.pth")
    assert is_golden(found.outputs["logits"], recorded)


def test_verify_says_which_of_two_sets_of_weights_is_read(run, golden, tmp_path):
    state = official_state(golden)
    torch.save({"model": state, "model_ema": state}, tmp_path / "both.pth")
    out = run("zoo", "verify", TINY, "--file", tmp_path / "both.pth")[1]
    assert "read from   model_ema, which also holds model; published: model" in out


def test_verify_evaluates_on_imagenet_and_records_the_row(run, official_file, tmp_path):
    numbers = ImageNetInfo().label_names()
    val = write_pictures(tmp_path / "val", {numbers[0]: [10], numbers[1]: [200]})
    arguments = ("--imagenet-val", val, "--workers", 0, "--results", tmp_path / "results.csv")
    status, out, _ = run("zoo", "verify", TINY, "--file", official_file, *arguments)
    assert status == 0 and "published   top-1 82.6 %, a difference of " in out
    (row,) = read_results(tmp_path / "results.csv")
    assert (row.weights, row.sha256, row.images, row.size) == (TINY, file_sha256(official_file), 2, 224)
    assert f"a difference of {row.top1 - 82.6:+.2f}" in out


def test_verify_refuses_what_does_not_fit(refused, official_file, golden, tmp_path):
    assert "does not fit VSSD" in refused("zoo", "verify", "vssd_micro.in1k", "--file", official_file)
    state = official_state(golden)
    state["classifier.norm.bias"][3] = float("nan")
    torch.save({"model": state}, tmp_path / "nan.pth")
    assert "not finite" in refused("zoo", "verify", TINY, "--file", tmp_path / "nan.pth")
    torch.save({"model": {"a": print}}, tmp_path / "evil.pth")
    assert "names the global print" in refused("zoo", "verify", TINY, "--file", tmp_path / "evil.pth")
    arguments = ("--file", official_file, "--imagenet-val", tmp_path)
    assert "is for segmentation" in refused("zoo", "verify", "upernet_vmamba_tiny.160k_ade20k", *arguments)


@pytest.fixture
def detector_file(golden, tmp_path):
    """A file with the names of OpenMMLab's detectors, whose backbone has the parity weights."""
    backbone = {f"backbone.{k}": v for k, v in official_state(golden).items() if not k.startswith("classifier")}
    norms = {f"backbone.outnorm{i}.weight": torch.ones(96 * 2**i) for i in range(4)}
    state = {**backbone, **norms, "neck.fpn_convs.0.conv.weight": torch.ones(2)}
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "epoch_12.pth")
    return tmp_path / "epoch_12.pth", state


def test_the_backbone_of_a_detector_is_verified(run, refused, detector_file, official_file, golden):
    status, out, _ = run("zoo", "verify", "mask_rcnn_vmamba_tiny.1x_coco", "--file", detector_file[0])
    assert status == 0 and "read from   state_dict; published: state_dict" in out
    assert "tensors fit vmamba_tiny; 5 of neck and heads were not looked at, which needs make openmmlab" in out
    assert all(f"stage{i}" in out for i in range(4)) and "1 x 768 x 7 x 7: mean" in out
    line = refused("zoo", "verify", "mask_rcnn_vmamba_small.1x_coco", "--file", detector_file[0])
    assert "does not fit VMamba" in line
    assert "no name begins with backbone" in refused(
        "zoo", "verify", "mask_rcnn_vmamba_tiny.1x_coco", "--file", official_file
    )


def test_a_detector_is_converted_with_its_own_names(run, detector_file, tmp_path):
    path, state = detector_file
    output = tmp_path / "detector.safetensors"
    assert run("zoo", "convert", "mask_rcnn_vmamba_tiny.1x_coco", "--file", path, "-o", output)[0] == 0
    with safe_open(output, "pt") as stream:
        assert stream.metadata()["names"] == "official" and set(stream.keys()) == set(state)
        assert all(torch.equal(stream.get_tensor(key), state[key]) for key in state)


def test_a_medical_network_is_verified_and_converted(run, tmp_path):
    golden = load_golden("mhs_vmunet")
    state = official_state(golden)
    torch.save(state, tmp_path / "best_4h.pth")
    assert run("zoo", "add", "mhsvmunet_4h.isic18", tmp_path / "best_4h.pth")[0] == 0
    status, out, _ = run("zoo", "verify", "mhsvmunet_4h.isic18")
    assert status == 0 and "read from   top level; published: not stated" in out and "1 x 1 x 256 x 256" in out
    output = tmp_path / "mhs.safetensors"
    assert run("zoo", "convert", "mhsvmunet_4h.isic18", "-o", output)[0] == 0
    network = networks.MHSVMUNet(2, 3, 1, sra_threshold=0.4)
    load_official(network, output)
    want = networks.MHSVMUNet(2, 3, 1, sra_threshold=0.4)
    load_official(want, state)
    assert all(map(torch.equal, network.state_dict().values(), want.state_dict().values()))


def test_tied_and_transposed_tensors_can_be_converted(run, golden, tmp_path):
    state = official_state(golden)
    key = "layers.0.blocks.0.mlp.fc1.weight"
    state[key] = state[key].T.contiguous().T
    save = {**state, "layers.0.blocks.0.norm.weight": state["layers.0.blocks.0.norm2.weight"]}
    torch.save({"model": save}, tmp_path / "tied.pth")
    output = tmp_path / "tied.safetensors"
    assert run("zoo", "convert", TINY, "--file", tmp_path / "tied.pth", "-o", output)[0] == 0
    model = timm.create_model("vmamba_tiny")
    load_official(model, output)
    assert torch.equal(model.stages[0].blocks[0].mlp.fc1.weight, state[key])
    assert torch.equal(model.stages[0].blocks[0].norm1.weight, model.stages[0].blocks[0].norm2.weight)


def test_a_damaged_lock_file_is_one_line(refused, folder):
    folder.mkdir(parents=True)
    (folder / "vssm-zoo.lock.json").write_text("{")
    for arguments in (("list",), ("show", TINY), ("get", TINY)):
        assert "vssm-zoo.lock.json is damaged" in refused("zoo", *arguments)
