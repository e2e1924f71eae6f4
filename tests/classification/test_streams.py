"""WebDataset shards, read by timm: learnt from in the order of their reader, resumed at the same place."""

import io
import json
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vssm.classification.data import TRAINING, Digits
from vssm.classification.fitting import LAST, train
from vssm.classification.loading import _named
from vssm.classification.options import ClassifierOptions
from vssm.training.checkpoints import load_checkpoint
from vssm.training.records import read_rows

SHARDS, EACH = 2, 16


@pytest.fixture
def options(tmp_path):
    """Two shards of 16 digits in each part."""
    digits, place, info = Digits(TRAINING), 0, {}
    for part in ("train", "validation"):
        names = [f"digits-{part}-{shard:04d}.tar" for shard in range(SHARDS)]
        info[part] = {
            "name": part,
            "num_samples": SHARDS * EACH,
            "filenames": names,
            "shard_lengths": [EACH] * SHARDS,
        }
        for name in names:
            with tarfile.open(tmp_path / name, "w") as shard:
                for _ in range(EACH):
                    picture = io.BytesIO()
                    Image.fromarray(digits.pictures[place]).save(picture, "png")
                    for suffix, content in (("png", picture.getvalue()), ("cls", str(digits.targets[place]).encode())):
                        entry = tarfile.TarInfo(f"{place:06d}.{suffix}")
                        entry.size = len(content)
                        shard.addfile(entry, io.BytesIO(content))
                    place += 1
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    return ClassifierOptions(
        model="vmamba_tiny",
        model_arguments={"depths": [1, 1], "dims": [8, 16]},
        data=str(tmp_path),
        dataset="wds",
        num_classes=10,
        image_size=32,
        epochs=2,
        batch_size=8,
        warmup_epochs=0,
        workers=1,
        cpu=True,
    )


def test_a_run_on_shards_resumes_where_it_stopped(options, tmp_path):
    class Crash(BaseException):
        pass

    def stop(now):
        if now.step == 6:
            raise Crash

    train(options, tmp_path / "whole")
    with pytest.raises(Crash):
        train(options, tmp_path / "run", on_step=stop)
    train(options, tmp_path / "run", resume=True)
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "run" / "metrics.csv").read_text()
    states = [load_checkpoint(tmp_path / name / LAST) for name in ("whole", "run")]
    torch.testing.assert_close(states[0]["network"], states[1]["network"], atol=0, rtol=0)


def test_shards_do_not_name_their_classes(options, tmp_path):
    with pytest.raises(ValueError, match="num_classes is 0, the data have classes without names; give their number"):
        train(replace(options, num_classes=0), tmp_path / "run")


def test_a_stream_that_ends_early_is_named(options, tmp_path):
    with pytest.raises(ValueError, match=r"the data end after 4 of 9 steps of an epoch; set steps_per_epoch"):
        train(replace(options, steps_per_epoch=9), tmp_path / "run")


def test_what_a_reader_raises_becomes_one_sentence_even_without_words():
    def read():
        yield 1
        raise AssertionError

    batches = _named(read(), "wds")
    assert next(batches) == 1
    with pytest.raises(ValueError, match=r"^wds cannot be read further: AssertionError$"):
        next(batches)
