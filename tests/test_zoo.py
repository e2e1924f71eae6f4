"""The model zoo's facts agree with what timm is told, and its table with what the models are."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._registry import _model_pretrained_cfgs

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import model_table

from vssm import networks, zoo
from vssm.classification.results import Result, record
from vssm.cli import model_names
from vssm.complexity import complexity

NAMES = model_names()
TAGGED = sorted(key for key in _model_pretrained_cfgs if key.partition(".")[0] in NAMES and "." in key)
ROOT = Path(__file__).parents[1]


def test_every_tag_has_its_facts_and_every_fact_its_tag():
    assert sorted(zoo.published("classification")) == TAGGED


def test_every_row_of_the_published_tables_is_there():
    counted = Counter((facts.family, facts.task) for facts in zoo.published().values())
    assert counted == {
        ("efficientvmamba", "classification"): 3,
        ("groupmamba", "classification"): 3,
        ("hrvmamba", "classification"): 4,
        ("lbvim", "classification"): 4,
        ("mhsvmunet", "medical"): 2,
        ("msvmamba", "classification"): 6,
        ("msvmamba", "detection"): 4,
        ("msvmamba", "segmentation"): 2,
        ("vcmamba", "classification"): 3,
        ("vim", "classification"): 5,
        ("vmamba", "classification"): 9,
        ("vmamba", "detection"): 13,
        ("vmamba", "segmentation"): 7,
        ("vmunet", "medical"): 2,
        ("vssd", "classification"): 7,
        ("vssd", "detection"): 6,
        ("vssd", "segmentation"): 2,
    }


@pytest.mark.parametrize("name", zoo.published())
def test_a_row_says_where_the_file_is_what_loads_it_and_on_what_terms(name):
    facts = zoo.published()[name]
    assert facts.url.startswith("https://") or facts.page.startswith("https://")
    assert facts.file_name or not facts.url
    assert facts.weights_licence and facts.code_licence and facts.commit and facts.repository
    assert facts.model_name in NAMES or facts.model_name in networks.__all__
    assert re.fullmatch("[0-9a-f]{64}|", facts.sha256) and (facts.bytes is None or facts.bytes > 0)
    published = {"detection": {"box_ap", "mask_ap"}, "segmentation": {"miou_ss"}}.get(facts.task, set())
    assert published <= facts.metrics.keys()
    low, high = (0.5, 1) if facts.task == "medical" else (35, 90)
    assert all(low < value < high for value in facts.metrics.values())


def test_every_classifier_detector_and_segmentor_has_a_configuration():
    assert {facts.task for facts in zoo.published().values() if not facts.config} == {"medical"}


@pytest.mark.parametrize("name", [name for name, facts in zoo.published().items() if facts.config])
def test_the_configuration_of_a_row_is_there_and_names_its_model(name):
    facts = zoo.published()[name]
    assert re.search(rf"\b{facts.model_name}\b", (ROOT / facts.config).read_text())


def test_two_rows_share_a_file_only_where_their_authors_do():
    shared = Counter(facts.url for facts in zoo.published().values() if facts.url)
    twice = [url for url, count in shared.items() if count > 1]
    assert [Path(url).name for url in twice] == ["mask_rcnn_vssd_fpn_coco_small.pth"]


def test_the_network_of_a_medical_row_can_be_built():
    for facts in zoo.published("medical").values():
        if facts.model_name in networks.__all__:
            with torch.device("meta"):
                network = getattr(networks, facts.model_name)(**facts.arguments)
            assert facts.input_size[0] == facts.arguments["in_channels"] and hasattr(network, "convert_official")


@pytest.mark.parametrize("key", TAGGED)
def test_addresses_and_papers_are_those_of_the_model_file(key):
    facts, cfg = zoo.published()[key], get_pretrained_cfg(key)
    assert facts.url == (cfg.url or "")
    assert facts.paper == cfg.paper_ids and facts.repository == cfg.origin_url
    if not facts.url:
        assert facts.page in cfg.notes
    assert facts.top1 is None or 70 < facts.top1 < 90


def test_the_page_is_the_one_that_its_sources_give():
    assert list(zoo.measured()) == NAMES
    page = (ROOT / "model_zoo" / "README.md").read_text()
    assert page == model_table.page(), "run python tools/model_table.py --models ''"
    assert all(f"`{name}`" in page for name in NAMES)
    assert all(f"[{key.partition('.')[2]}](" in page for key in TAGGED)
    assert all(f"[{name}](" in page for name, facts in zoo.published().items() if facts.task != "classification")


def test_results_of_evaluations_come_onto_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(model_table, "ROOT", tmp_path)
    assert model_table.NO_RESULTS in model_table.page()
    row = Result(
        "vssd_micro.in1k", "", "imagenet-val", 224, 50000, 82.46, 96.01, 0.8, 0.875, "bicubic", "float32", "cpu: x",
        "vssm", "2026-11-26",
    )  # fmt: skip
    record(tmp_path / "model_zoo" / "results.csv", [row, replace(row, data="imagenet-v2", top1=71.5)])
    page = model_table.page()
    assert model_table.NO_RESULTS not in page
    val = "| `vssd_micro.in1k` | imagenet-val | 224 | 50,000 | 82.46 | 96.01 | 82.5 | float32 | cpu: x | 2026-11-26 |"
    assert val in page and "| imagenet-v2 | 224 | 50,000 | 71.50 | 96.01 | - |" in page


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_the_table_are_those_of_the_model(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    row = zoo.measured()[name]
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.input_size == get_pretrained_cfg(name).input_size
    assert row.parity is None or row.parity < 3e-3


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("tiny", "nano"))])
def test_operations_in_the_table_are_those_of_the_model(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    row = zoo.measured()[name]
    assert complexity(model, row.input_size).gflops == pytest.approx(row.gflops, abs=6e-4)


def test_published_operations_are_met_within_three_percent_or_the_page_says_why():
    for key, facts in zoo.published("classification").items():
        if facts.gflops is None:
            continue
        counted = zoo.measured()[key.partition(".")[0]].gflops
        # Published with one decimal: half of the last place is not a difference.
        apart = max(abs(counted - facts.gflops) - 0.05, 0) / facts.gflops
        assert apart <= 0.03 or facts.gflops_note, f"{key}: {counted} counted, {facts.gflops} published"


def test_a_wrong_field_is_named_with_its_file(tmp_path, monkeypatch):
    (tmp_path / "x.toml").write_text('[source]\npaper = "p"\n[weights."a.b"]\nurll = "u"\n')
    monkeypatch.setattr(zoo, "FOLDERS", (tmp_path,))
    with pytest.raises(ValueError, match=r"x.toml: a.b: .*urll"):
        zoo.published.__wrapped__()


@pytest.mark.parametrize(
    ("line", "words"),
    [('task = "detecting"', "task must be one of"), ("metrics = { top2 = 1.0 }", "unknown metrics top2")],
)
def test_a_wrong_value_is_named_with_its_file(tmp_path, monkeypatch, line, words):
    source = "\n".join(f'{key} = "x"' for key in ("paper", "repository", "commit", "code_licence", "weights_licence"))
    (tmp_path / "x.toml").write_text(f'[source]\n{source}\n[weights."a.b"]\nurl = ""\n{line}\n')
    monkeypatch.setattr(zoo, "FOLDERS", (tmp_path,))
    with pytest.raises(ValueError, match=rf"x.toml: a.b: {words}"):
        zoo.published.__wrapped__()


def test_a_missing_zoo_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "FOLDERS", (tmp_path / "none",))
    with pytest.raises(FileNotFoundError, match="reinstall vssm"):
        zoo.folder()


def test_the_tool_refuses_a_pattern_that_fits_nothing():
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "model_table.py", "--models", "resnet*"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 2 and "no registered model fits 'resnet*'" in run.stderr
    json.loads((ROOT / "model_zoo" / "models.json").read_text())
