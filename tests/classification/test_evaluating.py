"""Accuracy and loss over a loader."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vssm.classification.evaluating import evaluate


class Table(nn.Module):
    """Gives the row of a table that the image's only value names."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images):
        assert not self.training
        return self.logits[images[:, 0, 0, 0].long()]


def images(rows) -> torch.Tensor:
    return torch.as_tensor(rows).float().view(-1, 1, 1, 1)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(7, 9, generator=torch.Generator().manual_seed(0))


def test_figures_are_those_of_all_images_whatever_the_batches(logits):
    targets = logits.argsort(dim=1, descending=True)[torch.arange(7), [0, 0, 1, 4, 5, 8, 0]]
    want = {"top1": 300 / 7, "top5": 500 / 7, "loss": F.cross_entropy(logits, targets).item(), "count": 7}
    for sizes in ([7], [3, 3, 1], [1] * 7):
        loader = zip(images(range(7)).split(sizes), targets.split(sizes), strict=True)
        assert evaluate(Table(logits), loader, "cpu") == pytest.approx(want, rel=1e-6)


def test_only_the_chosen_classes_compete(logits):
    logits[:, 0] = 100.0
    chosen = [1, 4, 8]
    got = evaluate(Table(logits), [(images(range(7)), logits[:, chosen].argmax(dim=1))], "cpu", classes=chosen)
    assert got["top1"] == 100 and got["top5"] == 100
    want = F.cross_entropy(logits[:, chosen], logits[:, chosen].argmax(dim=1)).item()
    assert got["loss"] == pytest.approx(want, rel=1e-6)
    assert evaluate(Table(logits), [(images(range(7)), logits[:, 1:].argmax(dim=1) + 1)], "cpu")["top1"] == 0


def test_the_mode_of_the_model_comes_back(logits):
    model = Table(logits).train()
    evaluate(model, [(images([0]), torch.tensor([0]))], "cpu")
    assert model.training


def test_autocast_is_on_where_asked_for():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    evaluate(model, [batch], "cpu")
    evaluate(model, [batch], "cpu", amp=torch.bfloat16)
    assert seen == [torch.float32, torch.bfloat16]


def test_what_cannot_be_evaluated_is_refused(logits):
    with pytest.raises(ValueError, match="no images"):
        evaluate(Table(logits), [], "cpu")
    with pytest.raises(ValueError, match="below the 9 classes of the model, got 0 to 9"):
        evaluate(Table(logits), [(images([0, 0]), torch.tensor([0, 9]))], "cpu")
    logits[3, 2] = float("nan")
    loader = [(images([0, 1]), torch.tensor([0, 0])), (images([3]), torch.tensor([0]))]
    with pytest.raises(FloatingPointError, match="after 2 images"):
        evaluate(Table(logits), loader, "cpu")
