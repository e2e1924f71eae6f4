"""The model zoo's facts agree with what timm is told, and its table with what the models are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._registry import _model_pretrained_cfgs

from vssm import zoo
from vssm.cli import model_names
from vssm.complexity import complexity

NAMES = model_names()
TAGGED = sorted(key for key in _model_pretrained_cfgs if key.partition(".")[0] in NAMES and "." in key)
ROOT = Path(__file__).parents[1]


def test_every_tag_has_its_facts_and_every_fact_its_tag():
    assert sorted(zoo.published()) == TAGGED


@pytest.mark.parametrize("key", TAGGED)
def test_addresses_and_papers_are_those_of_the_model_file(key):
    facts, cfg = zoo.published()[key], get_pretrained_cfg(key)
    assert facts.url == (cfg.url or "")
    assert facts.paper == cfg.paper_ids and facts.repository == cfg.origin_url
    # There is a way to the weights: a download, or a page for a person.
    assert facts.url.startswith("https://") or facts.page.startswith("https://")
    if not facts.url:
        assert facts.page in cfg.notes
    assert facts.weights_licence and facts.code_licence and facts.commit
    assert facts.top1 is None or 70 < facts.top1 < 90


def test_the_table_covers_every_model():
    assert list(zoo.measured()) == NAMES
    page = (ROOT / "model_zoo" / "README.md").read_text()
    assert all(f"`{name}`" in page for name in NAMES)
    assert all(f"[{key.partition('.')[2]}](" in page for key in TAGGED)


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
    for key, facts in zoo.published().items():
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
