"""The shipped configurations: every one is read, and names a network that its plan can build."""

from pathlib import Path

import pytest

import vssm.networks
from vssm.segmentation import TrainingOptions
from vssm.segmentation.schedule import rate_at
from vssm.training.options import read_options

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "medical"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "demo_brain.yaml")


def options(name, *settings):
    return read_options(TrainingOptions, FOLDER / name, settings)


def test_all_published_recipes_are_there():
    assert NAMES == sorted(
        ["abdomen_ct.yaml", "amos_mr.yaml", "brats2023.yaml", "isic17.yaml", "isic18.yaml", "synapse.yaml", "acdc.yaml"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_read_and_its_network_exists(name):
    package, _, network = options(name).network.rpartition(".")
    assert package == "vssm.networks"
    if network not in vssm.networks.__all__:
        pytest.skip(f"{network} is not part of this version")


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
