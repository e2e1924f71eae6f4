"""Two classifiers on a pyramid: their mean, and the pair for a distillation loss."""

import pytest
import torch
from torch import nn

from vssm.layers.pyramid import PatchStem
from vssm.models.distilled import DISTILLED_CLASSIFIERS, DistilledHeads
from vssm.models.pyramid import Pyramid, Stage, pyramid_info


class Distilled(DistilledHeads, Pyramid):
    def __init__(self, num_classes: int = 5, global_pool: str = "avg", drop_rate: float = 0.0):
        super().__init__()
        self.in_chans, self.drop_rate, self.num_features = 3, drop_rate, 8
        self.stem, self.norm = PatchStem(3, 8), nn.Identity()
        self.stages = nn.Sequential(Stage(nn.Identity(), [nn.Linear(8, 8)]))
        self.feature_info = pyramid_info((8,))
        self.reset_classifier(num_classes, global_pool)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def test_logits_are_the_mean_of_two_different_classifiers(images):
    model = Distilled().eval()
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    labels, teacher = (classifier(pooled) for classifier in model.get_classifier())
    assert not torch.allclose(labels, teacher)
    torch.testing.assert_close(model(images), (labels + teacher) / 2)


def test_the_pair_comes_in_training_only_and_only_when_asked_for(images):
    model = Distilled().train()
    assert model(images).shape == (2, 5)
    model.set_distilled_training()
    labels, teacher = model(images)
    assert torch.equal(labels, model.head(model.forward_features(images)))
    torch.testing.assert_close((labels + teacher) / 2, model.eval()(images))
    model.train().set_distilled_training(False)
    assert model(images).shape == (2, 5)


def test_each_loss_of_the_pair_reaches_its_own_classifier(images):
    model = Distilled().train()
    model.set_distilled_training(True)
    model(images)[1].sum().backward()
    assert model.head.fc.weight.grad is None and model.head_dist.weight.grad.abs().sum() > 0


def test_both_classifiers_are_reset_with_pooling_dtype_and_mode(images):
    model = Distilled(drop_rate=0.5).double().train()
    model.reset_classifier(7, "catavgmax")
    assert [(c.in_features, c.out_features, c.weight.dtype) for c in model.get_classifier()] == [
        (16, 7, torch.float64)
    ] * 2
    assert model(images.double()).shape == (2, 7)


def test_without_classes_the_pooled_features_come_out(images):
    model = Distilled(num_classes=0).eval()
    assert all(isinstance(classifier, nn.Identity) for classifier in model.get_classifier())
    assert torch.equal(model(images), model.forward_features(images).mean((2, 3)))


def test_the_names_for_the_configuration_are_the_classifiers():
    model = Distilled()
    assert tuple(model.get_submodule(name) for name in DISTILLED_CLASSIFIERS) == model.get_classifier()
