"""Ratings of label maps: against MONAI's metrics on whole volumes, and against counts made by hand."""

import json
import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from vssm import cli
from vssm.volumes import VolumeError
from vssm.volumes.evaluation import METRICS, Rating, evaluate_files, pair_files, summarise
from vssm.volumes.evaluation_report import write_report

SCALED = np.diag([1.5, 1.0, 3.0, 1.0])


def ball(shape, centre, radius):
    grid = np.indices(shape)
    return sum((grid[i] - centre[i]) ** 2 for i in range(3)) <= radius**2


@pytest.fixture
def pair(save, rng):
    """Two label maps of two labels that overlap in part, on voxels of 1.5 x 1 x 3 mm; one ball touches the border."""
    shape = (24, 20, 16)
    reference, predicted = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    reference[ball(shape, (8, 8, 8), 6)] = 1
    predicted[ball(shape, (9, 8, 7), 6)] = 1
    reference[ball(shape, (19, 14, 2), 4)] = 2
    predicted[ball(shape, (20, 13, 2), 3)] = 2
    predicted[rng.random(shape) > 0.995] = 2
    return save(predicted, SCALED, "p.nii.gz"), save(reference, SCALED, "r.nii.gz"), predicted, reference


def test_metrics_equal_monais_on_the_whole_volume(pair):
    *files, predicted, reference = pair
    ratings = evaluate_files(*files, tolerance_mm=1.6)
    assert [rating.label for rating in ratings] == [1, 2]
    for rating in ratings:
        one_hot = [torch.from_numpy(labels == rating.label)[None, None] for labels in (predicted, reference)]
        options = {"include_background": True, "spacing": [1.5, 1.0, 3.0]}
        want = [
            compute_dice(*one_hot),
            compute_surface_dice(*one_hot, [1.6], **options),
            compute_hausdorff_distance(*one_hot, percentile=95, **options),
        ]
        got = rating.dice, rating.surface_dice, rating.hausdorff95_mm
        np.testing.assert_allclose(got, [value.item() for value in want], rtol=1e-6)
        assert 0 < rating.dice < 1 and 0 < rating.surface_dice < 1 and rating.hausdorff95_mm > 0


def test_volumes_are_in_millilitres(pair):
    *files, predicted, reference = pair
    first = evaluate_files(*files)[0]
    assert first.reference_ml == pytest.approx((reference == 1).sum() * 4.5 / 1000)
    assert first.volume_difference_ml == pytest.approx(((predicted == 1).sum() - (reference == 1).sum()) * 4.5 / 1000)


def test_a_perfect_prediction_has_the_best_ratings(pair):
    for rating in evaluate_files(pair[1], pair[1], tolerance_mm=0):
        values = [getattr(rating, metric) for metric in METRICS]
        assert values == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_lesions_are_counted_as_components(save):
    reference, predicted = np.zeros((12, 12, 12), np.uint8), np.zeros((12, 12, 12), np.uint8)
    # Three lesions, of which two touch at a corner only and are therefore one.
    reference[1:3, 1:3, 1:3] = reference[3:5, 3:5, 3:5] = reference[9:11, 9:11, 9:11] = 1
    # One found, at two places; one missed; two false.
    predicted[1, 1, 1] = predicted[4, 4, 4] = predicted[1, 9, 1] = predicted[9, 1, 9] = 1
    (rating,) = evaluate_files(save(predicted, name="p.nii"), save(reference, name="r.nii"))
    assert rating.lesion_f1 == pytest.approx(2 * 1 / (2 * 1 + 2 + 1))


def test_empty_masks_follow_the_stated_conventions(save):
    empty, full = np.zeros((6, 6, 6), np.uint8), np.zeros((6, 6, 6), np.uint8)
    full[2:4, 2:4, 2:4] = 1
    paths = save(empty, name="e.nii"), save(full, name="f.nii")
    names = {1: "tumour", 5: "absent"}
    for predicted, reference, sign in ((*paths, -1), (*paths[::-1], 1)):
        tumour, absent = evaluate_files(predicted, reference, names=names)
        assert (tumour.name, tumour.dice, tumour.surface_dice, tumour.lesion_f1) == ("tumour", 0, 0, 0)
        assert math.isinf(tumour.hausdorff95_mm) and np.sign(tumour.volume_difference_ml) == sign
        assert all(math.isnan(getattr(absent, metric)) for metric in METRICS)
    assert evaluate_files(paths[0], paths[0]) == []


def rating(case: str, dice: float, distance: float) -> Rating:
    return Rating(case, 1, "a", dice, dice, distance, 0.0, dice, 1.0, 1.0)


def test_summaries_leave_out_what_was_not_rated_and_bracket_the_mean():
    values = [0.5, 0.7, 0.9, 0.8, float("nan")]
    rows = [rating(str(i), value, value) for i, value in enumerate(values)]
    dice = summarise(rows)[0]
    assert (dice.metric, dice.cases) == ("dice", 4)
    assert dice.mean == pytest.approx(0.725) and dice.median == pytest.approx(0.75)
    # The mean of four draws from these values, 2.5th and 97.5th percentile of its distribution.
    draws = np.random.default_rng(1).choice(values[:4], (20000, 4)).mean(1)
    assert (dice.low, dice.high) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))), abs=0.02)


def test_infinite_distances_are_counted_and_spare_the_median():
    rows = [rating("a", 0.9, 1.0), rating("b", 0.8, 2.0), rating("c", 0.0, float("inf"))]
    distance = summarise(rows)[2]
    assert (distance.cases, distance.infinite, distance.median) == (3, 1, 2.0)
    assert math.isnan(distance.mean) and math.isnan(distance.low)


def test_a_single_case_has_no_interval():
    dice = summarise([rating("a", 0.9, 1.0)])[0]
    assert dice.mean == 0.9 and math.isnan(dice.low) and math.isnan(dice.high)


def test_what_cannot_be_compared_is_refused(save, refusal):
    labels = np.zeros((5, 6, 7), np.uint8)
    reference = save(labels, np.eye(4), "r.nii")
    moved = np.eye(4)
    moved[0, 3] = 4.0
    refused = {
        "lie 4 mm apart": save(labels, moved, "moved.nii"),
        "resample the prediction": save(labels[:4], np.eye(4), "small.nii"),
        "are no labels": save(labels + np.float32(0.5), np.eye(4), "image.nii"),
    }
    for words, path in refused.items():
        assert words in refusal(path, lambda path: evaluate_files(path, reference))
    with pytest.raises(ValueError, match="tolerance_mm is -1"):
        evaluate_files(reference, reference, tolerance_mm=-1)


def test_folders_are_matched_by_name(tmp_path, save):
    labels = np.zeros((3, 3, 3), np.uint8)
    for folder in ("p", "r"):
        (tmp_path / folder).mkdir()
    for name in ("p/a.nii", "p/b.nii.gz", "p/more.nii", "r/a.nii.gz", "r/b.nii"):
        save(labels, name=name)
    pairs = pair_files(tmp_path / "p", tmp_path / "r")
    assert [(p.name, r.name) for p, r in pairs] == [("a.nii", "a.nii.gz"), ("b.nii.gz", "b.nii")]
    save(labels, name="r/c.nii")
    with pytest.raises(VolumeError, match="no prediction for c"):
        pair_files(tmp_path / "p", tmp_path / "r")
    with pytest.raises(VolumeError, match="two files or two folders"):
        pair_files(tmp_path / "p", tmp_path / "r" / "c.nii")
    (tmp_path / "none").mkdir()
    with pytest.raises(VolumeError, match=r"holds no .nii"):
        pair_files(tmp_path / "p", tmp_path / "none")


def test_the_report_holds_every_rating_the_summary_and_a_picture(pair, tmp_path):
    ratings = [*evaluate_files(*pair[:2]), rating("lost", 0.0, float("inf"))]
    written = write_report(ratings, summarise(ratings), 2.0, tmp_path / "report")
    assert [path.name for path in written] == ["cases.csv", "summary.json", "boxplot.png"]
    lines = written[0].read_text().splitlines()
    assert len(lines) == 1 + len(ratings) and lines[0].startswith("case,label,name,dice,")
    content = json.loads(written[1].read_text())
    assert content["surface_tolerance_mm"] == 2.0
    by_key = {(row["label"], row["name"], row["metric"]): row for row in content["summary"]}
    distance = by_key[1, "a", "hausdorff95_mm"]
    assert (distance["median"], distance["mean"], distance["infinite"]) == ("inf", None, 1)
    assert by_key[2, "label 2", "dice"]["mean"] == pytest.approx(ratings[1].dice)
    assert by_key[2, "label 2", "dice"]["low"] is None
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_a_table_and_writes_the_report(pair, tmp_path, capsys):
    out = tmp_path / "report"
    status = cli.main(["evaluate", str(pair[0]), str(pair[1]), "-o", str(out), "--names", "1=liver"])
    printed, err = capsys.readouterr()
    assert status == 0 and "not a medical device" in err
    rows = [line.split() for line in printed.splitlines()]
    dice = next(row for row in rows if row[:2] == ["liver", "dice"])
    assert float(dice[3]) == pytest.approx(evaluate_files(*pair[:2])[0].dice, abs=1e-4)
    assert (out / "boxplot.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.nii", "none.nii"], "no such file or folder"),
        (["{r}", "{r}", "--tolerance", "-1"], "--tolerance must be a distance"),
        (["{r}", "{r}", "--tolerance", "nan"], "--tolerance must be a distance"),
        (["{r}", "{r}", "--names", "liver"], "--names takes LABEL=NAME"),
        (["{r}", "{r}", "--names", "0=liver"], "a label of 1 or more"),
        (["{r}", "{r}", "-o", "{r}"], "File exists"),
    ],
)
def test_the_command_refuses_in_one_line(pair, capsys, arguments, words):
    status = cli.main(["evaluate", *(argument.replace("{r}", str(pair[1])) for argument in arguments)])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and words in err
