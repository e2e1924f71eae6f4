"""The shipped configurations: every one is read, and names a network that its plan can build."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vssm.segmentation import TrainingOptions
from vssm.segmentation.datasets import Case, Dataset
from vssm.segmentation.fingerprint import Fingerprint
from vssm.segmentation.network import build_network, define_network
from vssm.segmentation.planning import make_plan
from vssm.segmentation.schedule import rate_at
from vssm.training.options import read_options

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "medical"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "demo_brain.yaml")


def options(name, *settings):
    return read_options(TrainingOptions, FOLDER / name, settings)


def test_all_recipes_are_there():
    published = ["abdomen_ct", "acdc", "amos_mr", "brats2023", "isic17", "isic18", "synapse"]
    # and the small example of README
    assert NAMES == sorted(f"{name}.yaml" for name in [*published, "brain"])


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_builds_a_network_that_takes_its_patches(name):
    given = options(name)
    pictures = "isic" in name
    channels = given.channels or {"brats2023.yaml": ["t2w", "t2f", "t1n", "t1c"]}.get(name, ["CT"])
    labels = [f"label {index}" for index in range(len(given.labels) or 5)]
    case = Case("case", (), Path("case.png" if pictures else "case.nii.gz"))
    dataset = Dataset("data", tuple(channels), tuple(labels), (case,))
    ones = [1.0] * len(channels)
    shape, spacing = ([600, 800, 1], [1.0, 1.0, 1.0]) if pictures else ([512, 512, 90], [0.8, 0.8, 2.5])
    fingerprint = Fingerprint([shape] * 30, [spacing] * 30, ones, ones, ones, ones, 0.0, [30] * len(labels))
    plan = make_plan(
        fingerprint,
        dataset,
        8 * 10**9,
        given.precision,
        given.flat,
        given.patch_size,
        given.batch_size,
    )
    network = build_network(define_network(given, plan, dataset))
    # shapes only: nothing is computed
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = network(torch.zeros(1, len(channels), *plan.network_size))
    first = output[0] if given.deep_supervision else output
    assert first.shape == (1, len(labels), *plan.network_size)
    assert isinstance(output, list) == given.deep_supervision


@pytest.mark.parametrize(
    "name, epoch, rate",
    [
        ("abdomen_ct.yaml", 0, 0.01),
        ("abdomen_ct.yaml", 500, 0.01 * 0.5**0.9),
        ("isic18.yaml", 0, 1e-3),
        ("isic18.yaml", 25, (1e-3 + 1e-5) / 2),
        ("isic18.yaml", 50, 1e-5),
        ("isic18.yaml", 100, 1e-3),
        ("acdc.yaml", 150, (5e-4 + 1e-6) / 2),
    ],
)
def test_rates_are_the_papers(name, epoch, rate):
    given = options(name)
    assert rate_at(epoch * given.steps_per_epoch, given) == pytest.approx(rate)
    # per epoch: the same until its end
    assert rate_at((epoch + 1) * given.steps_per_epoch - 1, given) == pytest.approx(rate)


def test_warmup_rises_linearly_to_the_rate():
    given = options("brats2023.yaml", "warmup_epochs=2")
    assert rate_at(0, given) == pytest.approx(0.01 / 500)
    assert rate_at(249, given) == pytest.approx(0.005)
    assert rate_at(499, given) == pytest.approx(0.01)


@pytest.mark.parametrize("setting", ["epochs=0", "optimizer=adam", "resize=[256, 256]", "dice_weight=0", "epoch=3"])
def test_options_out_of_range_are_refused(setting):
    with pytest.raises(ValueError):
        options("brats2023.yaml", "ce_weight=0", setting)
