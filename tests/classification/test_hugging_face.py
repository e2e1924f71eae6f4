"""A data set as Hugging Face publishes them, Parquet files, read by timm."""

import io
from dataclasses import replace

import pytest
import yaml
from PIL import Image

from vssm.classification.data import TRAINING, Digits
from vssm.classification.fitting import BEST, train
from vssm.classification.options import ClassifierOptions
from vssm.classification.trained import read_trained
from vssm.training.records import read_rows

pytest.importorskip("datasets")
arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
NAMES = [f"digit {index}" for index in range(10)]
CLASSES = {"class_label": {"names": {str(index): name for index, name in enumerate(NAMES)}}}


def encoded(picture):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": None}


def write(folder, label):
    """64 digits in two parts, and the card that says so; `label` is the kind of the labels for Hugging Face."""
    digits, parts = Digits(TRAINING), {"train": range(48), "validation": range(48, 64)}
    for part, numbers in parts.items():
        columns = {
            "image": [encoded(digits.pictures[index]) for index in numbers],
            "label": arrow.array([int(digits.targets[index]) for index in numbers], arrow.int64()),
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table(columns), folder / "data" / f"{part}-00000-of-00001.parquet")
    card = {
        "dataset_info": {
            "features": [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": label}],
            "splits": [{"name": part, "num_examples": len(numbers)} for part, numbers in parts.items()],
        },
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": part, "path": f"data/{part}-*"} for part in parts],
            }
        ],
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


@pytest.fixture
def options(tmp_path):
    return ClassifierOptions(
        model="vmamba_tiny",
        model_arguments={"depths": [1, 1], "dims": [8, 16]},
        data=str(tmp_path / "cache"),
        dataset=f"hfds/{tmp_path / 'digits'}",
        image_size=32,
        epochs=1,
        batch_size=8,
        warmup_epochs=0,
        workers=1,
        cpu=True,
    )


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_a_run_learns_from_parquet_files_and_knows_their_classes(options, tmp_path, reader):
    write(tmp_path / "digits", CLASSES)
    options = replace(options, dataset=f"{reader}/{tmp_path / 'digits'}")
    assert train(options, tmp_path / "run").steps == 6
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == 1
    assert read_trained(tmp_path / "run" / BEST).classes == NAMES


def test_numbers_do_not_name_their_classes(options, tmp_path):
    write(tmp_path / "digits", "int64")
    with pytest.raises(ValueError, match="num_classes is 0, the data have classes without names; give their number"):
        train(options, tmp_path / "run")
    assert train(replace(options, num_classes=10), tmp_path / "run").steps == 6


def test_a_stream_of_fewer_files_than_workers_is_named(options, tmp_path):
    write(tmp_path / "digits", CLASSES)
    options = replace(options, dataset=f"hfids/{tmp_path / 'digits'}", workers=2)
    with pytest.raises(ValueError, match=r"digits cannot be read further: .*1 shard.*Reduce the number"):
        train(options, tmp_path / "run")
