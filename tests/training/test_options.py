"""Options from files that build on others, and from settings."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from vssm.training.options import Choice, Range, read_options


@dataclass(frozen=True)
class Options:
    name: str
    rate: Annotated[float, Range(0, 1)] = 0.5
    precision: Annotated[str, Choice(("no", "bf16"))] = "bf16"


@pytest.fixture
def files(tmp_path):
    """write(name=text, ...) writes NAME.yaml; returns the folder."""

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def test_a_file_adds_to_its_base_and_settings_win(files):
    texts = {
        "root": "name: root\nrate: 0.1\nprecision: bf16",
        "middle": "base: root.yaml\nrate: 0.2",
        "top": "base: middle.yaml\nname: top",
    }
    folder = files(**texts)
    assert read_options(Options, folder / "top.yaml", []) == Options("top", 0.2, "bf16")
    assert read_options(Options, folder / "top.yaml", ["rate=0.3"]) == Options("top", 0.3, "bf16")


def test_a_base_lies_beside_the_file_that_names_it(files, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "base.yaml").write_text("name: inner")
    folder = files(top="base: inner/base.yaml")
    assert read_options(Options, folder / "top.yaml", []).name == "inner"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"top": "base: other.yaml", "other": "base: top.yaml"}, "other.yaml: its base .*top.yaml is based on it"),
        ({"top": "base: nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        ({"top": "base: other.yaml", "other": "[1, 2]"}, "other.yaml: must be a table of options"),
    ],
)
def test_bases_that_cannot_be_used_are_named(files, texts, message):
    with pytest.raises(ValueError, match=message):
        read_options(Options, files(**texts) / "top.yaml", [])


def test_no_is_a_text_where_it_is_a_choice(files):
    folder = files(top="name: x\nprecision: no")
    assert read_options(Options, folder / "top.yaml", []).precision == "no"
    assert read_options(Options, folder / "top.yaml", ["precision=no"]).precision == "no"
    with pytest.raises(ValueError, match="option name must be str, got False"):
        read_options(Options, folder / "top.yaml", ["name=no"])
