"""Network and loss: what the plan gives, and nnU-Net's weights of deep supervision."""

import pytest
import torch
from monai.losses import DiceCELoss
from segmentation.test_patches import PLAN

from vssm.networks import UMambaEnc
from vssm.segmentation import TrainingOptions
from vssm.segmentation.datasets import Dataset
from vssm.segmentation.network import build_network, define_network, make_loss
from vssm.segmentation.validating import case_dice, mean_dice

DATA = Dataset("d", ("T1", "T2"), ("background", "organ"), ())


def test_a_network_of_plans_gets_its_stages_from_the_plan_and_the_options_win():
    options = TrainingOptions(
        data="", network="vssm.networks.UMambaEnc", network_arguments={"features": [4, 6], "mixer_stages": [1]}
    )
    definition = define_network(options, PLAN, DATA)
    assert definition["strides"] == PLAN.strides
    assert definition["img_size"] == PLAN.patch_size
    assert definition["features"] == [4, 6]
    network = build_network(definition)
    assert isinstance(network, UMambaEnc)
    outputs = network(torch.zeros(1, 2, *PLAN.patch_size))
    assert [output.shape[1] for output in outputs] == [2]


def test_networks_of_monai_get_what_they_have_arguments_for():
    options = TrainingOptions(
        data="", network="monai.networks.nets.UNet", network_arguments={"channels": [4, 8], "strides": [2]}
    )
    definition = define_network(options, PLAN, DATA)
    assert set(definition) == {"_target_", "spatial_dims", "in_channels", "out_channels", "channels", "strides"}
    build_network(definition)


def test_deep_supervision_weighs_one_half_a_quarter_and_not_the_lowest():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (2, 1, 8, 8, 8))
    # constant over blocks of 4, so that every resolution has the same labels
    labels = labels[..., ::4, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    outputs = [torch.randn(2, 2, side, side, side) for side in (8, 4, 2)]
    single = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)
    first, second = single(outputs[0], labels), single(outputs[1], labels[..., ::2, ::2, ::2])
    loss = make_loss(TrainingOptions(data=""))
    torch.testing.assert_close(loss(outputs, labels), (first + 0.5 * second) / 1.5)
    torch.testing.assert_close(loss(outputs[:1], labels), first)


def test_cross_entropy_alone_is_cross_entropy():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))
    loss = make_loss(TrainingOptions(data="", dice_weight=0.0))
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 0])
    torch.testing.assert_close(loss([logits], labels), expected)


def test_dice_of_cases_and_their_mean_leave_out_what_is_in_neither():
    truth = torch.tensor([0, 1, 1, 0])
    first = case_dice(torch.tensor([0, 1, 0, 0]), truth, 3)
    assert first[0] == pytest.approx(2 / 3)
    assert first[1] != first[1]
    second = case_dice(torch.tensor([0, 2, 2, 0]), truth, 3)
    assert second == [0, 0]
    assert mean_dice([first, second]) == pytest.approx([1 / 3, 0])
