"""The file of results."""

from dataclasses import replace

import pytest

from vssm.classification.results import Result, as_line, read_results, record

ROW = Result(
    "vmamba_tiny.s1l8_in1k", "ab" * 32, "imagenet-val", 224, 50000, 82.602, 95.91, 0.81234, 0.875, "bicubic",
    "float32", "cpu: x, with a comma", "vssm 1", "2026-11-26",
)  # fmt: skip


def test_rows_come_back_sorted_and_as_they_were(tmp_path):
    path = tmp_path / "new" / "results.csv"
    assert read_results(path) == []
    rows = [replace(ROW, size=384), ROW, replace(ROW, data="imagenet-a"), replace(ROW, precision="bfloat16")]
    for row in rows:
        record(path, [row])
    assert read_results(path) == sorted(rows, key=lambda row: row.key)


def test_the_same_evaluation_replaces_the_older_row(tmp_path):
    record(tmp_path / "r.csv", [ROW, replace(ROW, size=384)])
    newer = replace(ROW, top1=83.0, device="cuda: y")
    record(tmp_path / "r.csv", [newer])
    assert read_results(tmp_path / "r.csv") == [newer, replace(ROW, size=384)]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "", None])
def test_a_file_of_something_else_is_refused_and_left(tmp_path, content):
    path = tmp_path / "r.csv"
    if content is None:
        record(path, [ROW])
        content = path.read_text().replace("50000", "many")
    path.write_text(content)
    with pytest.raises(ValueError, match=r"r\.csv"):
        record(path, [ROW])
    assert path.read_text() == content


def test_a_line_for_the_terminal():
    assert as_line(ROW) == "imagenet-val      224 px   50000 images  top-1  82.60 %  top-5  95.91 %  loss 0.8123"
