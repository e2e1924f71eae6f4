"""The diagnosis names the first broken tensor, whichever it is."""

import pytest
import torch
from torch import nn

from vssm.training.diagnosis import TrainingError, check_weights, describe_failure

NAN = float("nan")


class Overflow(nn.Module):
    def forward(self, x):
        return x * 1e38 * 1e38


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def describe(network, images, loss_factor=1.0):
    output = network(images)
    loss = output.square().mean() * loss_factor
    loss.backward()
    return describe_failure(7, 0.1, network, images, [output], loss.detach())


def test_the_first_broken_tensor_is_named(network):
    good = torch.ones(2, 3)
    bad = torch.tensor([[1.0, NAN, 1.0]])
    assert "step 7" in describe(network, bad)
    assert "the images hold values" in describe(network, bad)
    assert "the output is finite, the loss is not" in describe(network, good, NAN).replace("network's ", "")
    network.zero_grad()
    network[2].weight.register_hook(lambda gradient: gradient * NAN)
    assert "the gradient is not, first in 2.weight" in describe(network, good)
    network.zero_grad()
    with torch.no_grad():
        network[0].bias[1] = float("inf")
    assert "the weights of 0.bias and 0 more" in describe(network, good)


def test_the_module_behind_which_values_break_is_named(network):
    network.insert(1, Overflow())
    text = describe(network, torch.ones(2, 3))
    assert "the network's output is not, first behind 1 (Overflow)" in text


def test_broken_weights_are_an_error_and_good_ones_are_not(network):
    check_weights(network, 3)
    with torch.no_grad():
        network[2].weight[0, 0] = NAN
    with pytest.raises(TrainingError, match=r"after step 3: the weights of 2\.weight are not finite"):
        check_weights(network, 3)
