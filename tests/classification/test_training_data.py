"""What a classifier is trained on: the parts, the order of an epoch, and transforms that depend on nothing else."""

import random
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vssm.classification.data import (
    TRAINING,
    VALIDATION,
    Digits,
    Reproducible,
    drawn_from,
    open_parts,
    open_pictures,
    order_of_epoch,
)
from vssm.classification.loading import (
    TrainingLoader,
    _augmentations,
    data_config,
    training_transform,
    validation_loader,
)
from vssm.classification.options import ClassifierOptions

OPTIONS = ClassifierOptions(model="vmamba_tiny", data="digits", image_size=16, batch_size=8)


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two classes, cat and dog, of 6 and 2 pictures each; the class is the colour."""
    for part, count in (("train", 6), ("val", 2)):
        for colour, name in ((50, "cat"), (200, "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 24), (colour, index, 0)).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_every_fifth_digit_is_held_out():
    training, validation = Digits(TRAINING), Digits(VALIDATION)
    assert (len(training), len(validation)) == (1433, 364)
    counts = np.bincount(training.targets) / (np.bincount(training.targets) + np.bincount(validation.targets))
    assert (np.abs(counts - 0.8) < 0.005).all()
    pictures = [{picture.tobytes() for picture in part.pictures} for part in (training, validation)]
    assert len(pictures[0] & pictures[1]) == 0


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own():
    first, second = (order_of_epoch(100, 3, epoch) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert not torch.equal(first, second)
    assert not torch.equal(first, order_of_epoch(100, 4, 0))
    torch.testing.assert_close(first, order_of_epoch(100, 3, 0), atol=0, rtol=0)


def test_repeats_come_in_succession_and_the_epoch_keeps_its_length():
    order = order_of_epoch(100, 0, 0, repeats=3).tolist()
    assert len(order) == 100
    assert [order[place] for place in range(0, 99, 3)] == order_of_epoch(100, 0, 0).tolist()[:33]
    assert all(len(set(order[place : place + 3])) == 1 for place in range(0, 99, 3))


def test_drawing_leaves_the_generators_as_they_were():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with drawn_from(1, 2, 3):
        inside = torch.rand(1).item(), random.random(), np.random.rand()
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    with drawn_from(1, 2, 3):
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == inside
    with drawn_from(1, 2, 4):
        assert torch.rand(1).item() != inside[0]


def batches(options, process=0, processes=1, epoch=0, done=0):
    pictures, _ = open_pictures(options, TRAINING)
    pictures.transform = training_transform(options, data_config(options, torch.nn.Module()))
    return list(TrainingLoader(pictures, options, process, processes).epoch(epoch, done))


def test_worker_processes_do_not_change_what_is_learnt_from():
    options = replace(OPTIONS, steps_per_epoch=3)
    for one, two in zip(batches(options), batches(replace(options, workers=2)), strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_a_picture_is_augmented_anew_in_every_epoch():
    pictures, _ = open_pictures(OPTIONS, TRAINING)
    pictures.transform = training_transform(OPTIONS, data_config(OPTIONS, torch.nn.Module()))
    drawn = Reproducible(pictures, seed=0)
    assert not torch.equal(drawn[7, 0, 3][0], drawn[7, 1, 3][0])
    assert not torch.equal(drawn[7, 0, 3][0], drawn[7, 0, 4][0])
    assert torch.equal(drawn[7, 0, 3][0], drawn[7, 0, 3][0])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "augmix-m5"])
def test_posterizing_to_no_bits_gives_a_black_picture(policy):
    """RandAugment asks for it about once in 650 pictures; Pillow 13 refuses it."""
    options = replace(OPTIONS, auto_augment=policy)
    transform = training_transform(options, data_config(options, torch.nn.Module()))
    ops = [op for op in _augmentations(transform) if op.name.startswith("Posterize")]
    assert ops
    picture = Image.new("RGB", (4, 4), (200, 100, 50))
    for op in ops:
        assert op.aug_fn(picture, 0).getcolors() == [(16, (0, 0, 0))]
        assert op.aug_fn(picture, 1).getcolors() == [(16, (128, 0, 0))]
        assert op.aug_fn(picture, 8).getcolors() == [(16, (200, 100, 50))]


def test_two_processes_share_the_batch_of_one():
    options = replace(OPTIONS, steps_per_epoch=2)
    whole = batches(replace(options, batch_size=16))
    parts = [batches(options, process, 2) for process in range(2)]
    for step, (images, targets) in enumerate(whole):
        for process in range(2):
            assert torch.equal(parts[process][step][0], images[process::2])
            assert torch.equal(parts[process][step][1], targets[process::2])


def test_steps_that_are_done_are_left_out():
    options = replace(OPTIONS, steps_per_epoch=4, accumulation=2)
    whole, rest = batches(options), batches(options, done=3)
    assert (len(whole), len(rest)) == (8, 2)
    assert torch.equal(whole[6][0], rest[0][0])


def test_validation_pictures_are_shared_out_once():
    pictures, _ = open_pictures(OPTIONS, VALIDATION)
    pictures.transform = lambda picture: torch.tensor(np.array(picture)[..., 0])
    found = [
        row for process in range(3) for images, _ in validation_loader(pictures, OPTIONS, process, 3) for row in images
    ]
    expected = sorted(picture.tobytes() for picture in pictures.pictures)
    assert sorted(row.numpy().tobytes() for row in found) == expected


def test_a_process_without_validation_pictures_is_refused(folder):
    pictures, _ = open_pictures(replace(OPTIONS, data=str(folder)), VALIDATION)
    with pytest.raises(ValueError, match="4 pictures to validate on are fewer than the 5 processes"):
        validation_loader(pictures, OPTIONS, 0, 5)


def test_folders_give_pictures_and_the_names_of_their_classes(folder):
    options = replace(OPTIONS, data=str(folder))
    training, names = open_pictures(options, TRAINING)
    training.transform = np.asarray
    assert names == ["cat", "dog"]
    assert len(training) == 12
    assert {(int(np.array(picture)[0, 0, 0]), target) for picture, target in (training[i] for i in range(12))} == {
        (50, 0),
        (200, 1),
    }
    assert len(open_pictures(options, VALIDATION)[0]) == 4


def test_tar_files_are_read_like_folders(folder, tmp_path):
    (tmp_path / "tars").mkdir()
    for part in ("train", "val"):
        with tarfile.open(tmp_path / "tars" / f"{part}.tar", "w") as archive:
            archive.add(folder / part, arcname=part)
    training, names = open_pictures(replace(OPTIONS, data=str(tmp_path / "tars")), TRAINING)
    training.transform = np.asarray
    assert names == ["cat", "dog"]
    assert [int(training[i][0][0, 0, 0]) for i in range(12)] == 6 * [50] + 6 * [200]


@pytest.mark.parametrize(
    ("break_it", "changed", "message"),
    [
        (lambda root: None, {"data": "nowhere"}, "nowhere: no such folder"),
        (lambda root: (root / "val").rename(root / "valid"), {}, "none of val, validation, test"),
        (lambda root: (root / "val" / "dog").rename(root / "val" / "dogs"), {}, "have other classes, dog"),
        (lambda root: (root / "train.tar").write_bytes(b"no archive"), {"only": "tar"}, "cannot be read as a tar file"),
        (lambda root: None, {"dataset": "lmdb/x"}, "dataset must start with hfds"),
        (lambda root: None, {"dataset": "hfds//no/such"}, "hfds//no/such cannot be read"),
    ],
)
def test_data_that_cannot_be_used_are_named(folder, monkeypatch, break_it, changed, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    break_it(folder)
    if changed.pop("only", None):
        (folder / "train").rename(folder / "elsewhere")
    options = replace(OPTIONS, **{"data": str(folder), **changed})
    with pytest.raises(ValueError, match=message):
        open_parts(options)


def test_too_few_pictures_for_a_step_are_refused(folder):
    pictures, _ = open_pictures(replace(OPTIONS, data=str(folder)), TRAINING)
    with pytest.raises(ValueError, match="12 pictures to train on are fewer than 1 steps of 16"):
        TrainingLoader(pictures, replace(OPTIONS, batch_size=16), 0, 1)
