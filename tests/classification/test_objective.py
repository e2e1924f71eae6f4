"""The losses against their formulas written out, and the models and schedules that options describe."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import vssm.models  # noqa: F401
from vssm.classification.building import Schedule, build_model, build_optimizer, build_teacher
from vssm.classification.objective import Objective, make_mixup
from vssm.classification.options import ClassifierOptions

OPTIONS = ClassifierOptions(
    model="vmamba_tiny", model_arguments={"depths": [1, 1], "dims": [8, 16]}, data="digits", image_size=32, batch_size=4
)
DISTILLED = {
    "model": "groupmamba_tiny",
    "model_arguments": {"depths": [1, 1], "dims": [8, 16], "stem_dim": 4, "mlp_ratios": [2.0, 2.0]},
    "teacher": "resnet18",
}


class Says(nn.Module):
    """Gives the same logits, whatever the pictures."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return [torch.randn(4, 5), torch.randn(4, 5)], torch.tensor([0, 3, 1, 4]), torch.zeros(4, 3, 8, 8)


def smoothed(targets, smoothing):
    return F.one_hot(targets, 5) * (1 - smoothing) + smoothing / 5


@pytest.mark.parametrize("mixed", [False, True])
def test_labels_are_smoothed_once(batch, mixed):
    outputs, targets, images = batch
    expected = -(smoothed(targets, 0.1) * outputs[0].log_softmax(1)).sum(1).mean()
    given = smoothed(targets, 0.1) if mixed else targets
    torch.testing.assert_close(Objective(OPTIONS)(outputs, given, images, 0.0), expected)


def test_binary_cross_entropy_rates_every_class(batch):
    outputs, targets, images = batch
    wanted = smoothed(targets, 0.1)
    p = outputs[0].sigmoid()
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    torch.testing.assert_close(Objective(replace(OPTIONS, loss="bce"))(outputs, targets, images, 0.0), expected)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_second_classifier_learns_from_the_teacher(batch, kind):
    outputs, targets, images = batch
    options = replace(
        OPTIONS, distillation=kind, teacher="x", distillation_share=0.3, distillation_temperature=2.0, smoothing=0.0
    )
    wanted = torch.randn(4, 5)
    labels = F.cross_entropy(outputs[0], targets)
    if kind == "hard":
        taught = -outputs[1].log_softmax(1)[torch.arange(4), wanted.argmax(1)].mean()
    else:
        teacher, student = (wanted / 2).softmax(1), (outputs[1] / 2).softmax(1)
        taught = (teacher * (teacher / student).log()).sum() / 20 * 4
    got = Objective(options, teacher=Says(wanted))(outputs, targets, images, 0.0)
    torch.testing.assert_close(got, 0.7 * labels + 0.3 * taught)


def test_mesa_begins_when_its_share_of_the_epochs_is_done(batch):
    outputs, targets, images = batch
    options = replace(OPTIONS, mesa=1.5, mesa_start=0.25)
    wanted = torch.randn(4, 5)
    objective = Objective(options, average=Says(wanted))
    plain = Objective(OPTIONS)(outputs, targets, images, 0.0)
    torch.testing.assert_close(objective(outputs, targets, images, 0.2499), plain, atol=0, rtol=0)
    added = -(wanted.softmax(1) * outputs[0].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective(outputs, targets, images, 0.25), plain + 1.5 * added)


def test_mixing_is_left_out_where_nothing_is_to_be_mixed():
    assert make_mixup(replace(OPTIONS, mixup=0.0, cutmix=0.0), 10) is None
    assert make_mixup(replace(OPTIONS, mixup_prob=0.0), 10) is None
    images, targets = make_mixup(OPTIONS, 10)(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert (images.shape, targets.shape) == ((4, 3, 8, 8), (4, 10))


def rate_of(step, peak, start, floor, warm, total, prefix):
    """The schedule as the papers' trainers have it, in steps."""
    if step < warm:
        return start + (peak - start) * step / warm
    step, length = (step - warm, total - warm) if prefix else (step, total)
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / length)) / 2


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("per_epoch", [False, True])
def test_the_rate_rises_and_falls_and_follows_the_batch(prefix, per_epoch):
    options = replace(
        OPTIONS,
        epochs=10,
        warmup_epochs=2,
        warmup_prefix=prefix,
        per_epoch=per_epoch,
        learning_rate=1e-3,
        rate_batch=1024,
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=5e-4)
    schedule = Schedule(options, optimizer, steps_per_epoch=7, pictures=512)
    # in another order than that of the training: the rate depends on the step alone
    for step in (69, 0, 13, 14, 35, 7):
        shown = step // 7 * 7 if per_epoch else step
        expected = rate_of(shown, 5e-4, 5e-7, 5e-6, 14, 70, prefix)
        assert schedule.set(step) == pytest.approx(expected, rel=1e-9)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


def test_what_must_not_decay_does_not():
    model = build_model(OPTIONS, 10)
    optimizer = build_optimizer(OPTIONS, model, 1e-3)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name.rpartition(".")[2] in ("A_logs", "Ds", "dt_projs_bias")
        assert decays[id(parameter)] == (0.0 if exempt else 0.05), name


def test_layers_near_the_picture_learn_slower():
    options = replace(OPTIONS, layer_decay=0.5)
    model = build_model(options, 10)
    optimizer = build_optimizer(options, model, 1e-3)
    Schedule(replace(options, warmup_epochs=0), optimizer, 10, 1024).set(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rate = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    first = next(name for name in rate if name.startswith("stem"))
    last = next(name for name in rate if name.startswith("head"))
    assert rate[first] < rate[last] == pytest.approx(1e-3)


def test_a_distilled_model_gives_both_classifiers_logits_and_its_teacher_stays_as_it_is(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=10).state_dict(), tmp_path / "teacher.pth")
    options = replace(OPTIONS, **DISTILLED, distillation="hard", teacher_weights=str(tmp_path / "teacher.pth"))
    model, teacher = build_model(options, 10), build_teacher(options, 10)
    first, second = model(torch.randn(2, 3, 32, 32))
    assert first.shape == second.shape == (2, 10)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": "resnet"}, "no model is called resnet;"),
        ({"teacher_weights": "nowhere.pth"}, "resnet18 cannot be had .*correct teacher_weights=nowhere.pth"),
    ],
)
def test_teachers_that_cannot_be_had_are_named(changed, message):
    options = replace(OPTIONS, **{**DISTILLED, "distillation": "soft", **changed})
    with pytest.raises(ValueError, match=message):
        build_teacher(options, 10)


def test_training_starts_from_a_file_of_another_number_of_classes(tmp_path):
    source = build_model(OPTIONS, 10)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    model = build_model(replace(OPTIONS, weights=str(tmp_path / "weights.pth")), 7)
    for name, value in model.state_dict().items():
        if not name.startswith("head.fc"):
            torch.testing.assert_close(value, source.state_dict()[name], atol=0, rtol=0)
    assert model.get_classifier().out_features == 7


def test_vim_goes_on_from_coarser_patches(tmp_path):
    """The long-sequence fine-tuning of Vim: the same weights at half the stride."""
    small = {"embed_dim": 16, "depth": 2}
    source = timm.create_model("vim_tiny", num_classes=10, img_size=64, **small)
    torch.save({"model": source.state_dict()}, tmp_path / "vim.pth")
    options = replace(
        OPTIONS, model="vim_tiny_stride8", model_arguments=small, image_size=64, weights=str(tmp_path / "vim.pth")
    )
    model = build_model(options, 10)
    assert model.pos_embed.shape[1] > source.pos_embed.shape[1]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
