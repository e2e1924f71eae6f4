"""A tiny data set and a tiny run, for tests that train."""

from dataclasses import replace

import pytest
from segmentation.samples import write_nnunet

from vssm.segmentation import TrainingOptions

# dropout draws from the generator whose state a checkpoint must keep
NETWORK = {"channels": [4, 8], "strides": [2], "dropout": 0.2}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """An nnU-Net folder of four volumes."""
    return write_nnunet(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def options(data):
    """Options of a run of seconds."""
    return TrainingOptions(
        data=str(data),
        network="monai.networks.nets.UNet",
        network_arguments=NETWORK,
        folds=2,
        epochs=3,
        steps_per_epoch=3,
        patch_size=[8, 8, 8],
        batch_size=2,
        learning_rate=0.05,
        momentum=0.9,
        average_decay=0.8,
        validate_every=1,
        worst_cases=1,
        cpu=True,
    )


@pytest.fixture(scope="session")
def plain_options(options):
    """The same without what takes time and without chance in the network."""
    return replace(options, network_arguments=NETWORK | {"dropout": 0.0}, augmentation="none", epochs=1)
