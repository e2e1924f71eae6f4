"""Records: exact numbers, rows of unfinished epochs dropped on resuming, TensorBoard and curves."""

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vssm.training.records import Records, draw_curves, read_rows

COLUMNS = ("epoch", "loss", "dice")


def write(folder, epochs, done=0):
    records = Records(folder, COLUMNS, done)
    for epoch in epochs:
        records.add({"epoch": epoch, "loss": 1 / epoch} | ({"dice": 0.1 * epoch} if epoch % 2 == 0 else {}))
    records.close()


def test_rows_hold_all_digits_and_empty_fields_stay_empty(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert read_rows(tmp_path / "metrics.csv") == [
        {"epoch": 1, "loss": 1.0},
        {"epoch": 2, "loss": 0.5, "dice": 0.2},
        {"epoch": 3, "loss": 1 / 3},
    ]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,1,"


def test_resuming_drops_rows_after_the_checkpoint_and_a_new_run_drops_all(tmp_path):
    write(tmp_path, [1, 2, 3])
    whole = (tmp_path / "metrics.csv").read_text()
    write(tmp_path, [2, 3], done=1)
    assert (tmp_path / "metrics.csv").read_text() == whole
    write(tmp_path, [], done=0)
    assert read_rows(tmp_path / "metrics.csv") == []


@pytest.mark.parametrize("cut", ["1", "3,0.", "2,0.5,"])
def test_a_row_cut_off_by_a_power_cut_is_dropped(tmp_path, cut):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write(cut)
    write(tmp_path, [], done=2)
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.csv")] == [1, 2]


def test_tensorboard_gets_the_finite_numbers(tmp_path):
    records = Records(tmp_path, COLUMNS)
    records.add({"epoch": 1, "loss": 0.25, "dice": math.nan})
    records.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (1, 0.25)


def test_curves_are_a_picture(tmp_path):
    write(tmp_path, [1, 2, 3])
    draw_curves(tmp_path / "metrics.csv", {"loss": ["loss"], "both": ["loss", "dice"]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
