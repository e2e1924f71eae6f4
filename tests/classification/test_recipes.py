"""The recipes of configs/imagenet: the published settings, models that exist, a step of every kind of training."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from families import family

from vssm import zoo
from vssm.classification.building import model_arguments
from vssm.classification.fitting import Run
from vssm.classification.options import ClassifierOptions
from vssm.training.options import read_options

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "imagenet"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "digits")
ROWS = zoo.published("classification")

# what the authors' files say takes effect: pictures a step, highest rate, lowest rate, weight decay, epochs, warm-up,
# gradient norm, average, precision, drop path
SWIN = {"batch": 1024, "peak": 1e-3, "floor": 1e-5, "decay": 0.05, "epochs": 300, "warm": 20, "clip": 5, "ema": 0.9999}
LARGE = SWIN | {"peak": 6e-4, "floor": 6e-6}
VIM = SWIN | {"warm": 5, "clip": 0, "ema": 0.99996, "precision": "no"}
EFFICIENT = SWIN | {"batch": 2048, "peak": 2e-3, "floor": 1e-6, "decay": 0.04, "clip": 1, "drop": 0.1}
HRV = SWIN | {"precision": "no", "size": 256}
FINE = VIM | {"peak": 1e-5, "decay": 1e-8, "epochs": 30, "drop": 0.0}
VCM = VIM | {"batch": 1152, "peak": 2.25e-3, "drop": 0.2}
PUBLISHED = {
    "vmambav0_tiny": SWIN | {"drop": 0.2, "ema": 0.0},
    "vmambav0_small": SWIN | {"drop": 0.3},
    "vmambav0_base": SWIN | {"drop": 0.5},
    "vmamba_tiny_s2l5": SWIN | {"drop": 0.2},
    "vmamba_small": SWIN | {"drop": 0.3},
    "vmamba_base": SWIN | {"drop": 0.6},
    "vmamba_tiny": SWIN | {"drop": 0.2},
    "vmamba_small_s1l20": SWIN | {"drop": 0.3},
    "vmamba_base_s1l20": SWIN | {"drop": 0.5},
    "msvmamba_nano": SWIN | {"drop": 0.2},
    "msvmamba_micro": SWIN | {"drop": 0.2},
    "msvmamba_tiny": SWIN | {"drop": 0.2},
    "msvmambav3_tiny": SWIN | {"drop": 0.2},
    "msvmambav3_small": SWIN | {"drop": 0.4},
    "msvmambav3_base": LARGE | {"drop": 0.5},
    "vssd_micro": SWIN | {"drop": 0.2},
    "vssd_tiny": SWIN | {"drop": 0.2},
    "vssd_small": LARGE | {"drop": 0.4},
    "vssd_base": LARGE | {"drop": 0.6},
    "vssd_tiny_mesa": SWIN | {"drop": 0.2, "mesa": 1.0},
    "vssd_small_mesa": LARGE | {"drop": 0.4, "mesa": 1.5},
    "vssd_base_mesa": LARGE | {"drop": 0.6, "mesa": 2.0},
    "groupmamba_tiny": SWIN | {"drop": 0.05, "distillation": "hard"},
    "groupmamba_small": SWIN | {"drop": 0.05, "distillation": "hard"},
    "groupmamba_base": SWIN | {"drop": 0.05, "distillation": "hard"},
    "efficientvmamba_tiny": EFFICIENT,
    "efficientvmamba_small": EFFICIENT,
    "efficientvmamba_base": EFFICIENT | {"batch": 1024},
    "hrvmamba_nano": HRV | {"batch": 2048, "peak": 2e-3, "floor": 2e-5, "drop": 0.1},
    "hrvmamba_tiny": HRV | {"batch": 2048, "peak": 2e-3, "floor": 2e-5, "drop": 0.1},
    "hrvmamba_small": HRV | {"drop": 0.2},
    "hrvmamba_base": HRV | {"drop": 0.2, "size": 224},
    "vim_tiny": VIM | {"decay": 0.1, "drop": 0.0},
    "vim_small": VIM | {"batch": 512, "drop": 0.05},
    "vim_base": VIM | {"batch": 512, "drop": 0.05},
    "vim_tiny_stride8": FINE,
    "vim_small_stride8": FINE,
    "lbvim_tiny": VIM | {"peak": 2e-3, "drop": 0.05},
    "lbvim_300": VIM | {"peak": 2e-3, "drop": 0.05},
    "lbvim_small": VIM | {"batch": 512, "drop": 0.05},
    "lbvim_528": VIM | {"batch": 512, "drop": 0.05},
    "vcmamba_small": VCM | {"distillation": "soft"},
    "vcmamba_medium": VCM | {"distillation": "soft"},
    "vcmamba_base": VCM | {"distillation": "soft"},
}
# every base, and every kind of loss
ONE_OF_EACH = (
    *("vmamba_tiny", "vssd_small_mesa", "groupmamba_tiny", "efficientvmamba_tiny"),
    *("hrvmamba_nano", "vim_tiny", "vcmamba_small"),
)


def recipe(name):
    return read_options(ClassifierOptions, FOLDER / f"{name}.yaml", [])


def test_every_row_of_the_zoo_has_a_recipe_and_every_recipe_a_row():
    assert {Path(facts.config).stem for facts in ROWS.values()} == set(RECIPES) == set(PUBLISHED)
    for facts in ROWS.values():
        assert recipe(Path(facts.config).stem).model == facts.model_name
        assert bool(recipe(Path(facts.config).stem).mesa) == ("mesa" in facts.name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_settings(name):
    options, known = recipe(name), PUBLISHED[name]
    factor = known["batch"] / options.rate_batch
    assert known["batch"] % options.batch_size == 0
    assert options.learning_rate * factor == pytest.approx(known["peak"])
    assert options.lowest_rate * factor == pytest.approx(known["floor"])
    assert options.weight_decay == pytest.approx(known["decay"])
    found = options.epochs, options.warmup_epochs, options.max_gradient, options.average_decay, options.drop_path
    assert found == tuple(known[key] for key in ("epochs", "warm", "clip", "ema", "drop"))
    assert options.precision == known.get("precision", "fp16")
    assert options.image_size == known.get("size", 224)
    assert (options.mesa, options.distillation) == (known.get("mesa", 0.0), known.get("distillation", "none"))
    deit = name.startswith(("vim", "lbvim", "vcmamba"))
    assert (options.repeats, options.per_epoch) == ((3, True) if deit else (1, False))
    assert options.warmup_prefix == (not deit and not name.startswith("hrvmamba"))
    crop = options.crop_pct or timm.get_pretrained_cfg(options.model).crop_pct
    assert crop == (1.0 if name.startswith("hrvmamba") else 0.875)
    efficient = name.startswith("efficient")
    assert (options.mixup, options.cutmix, options.smoothing) == (0.2 if efficient else 0.8, 1.0, 0.1)
    assert options.auto_augment == ("rand-m9-mstd0.5" if efficient else "rand-m9-mstd0.5-inc1")


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_of_a_recipe_can_be_made(name):
    options = recipe(name)
    with torch.device("meta"):
        model = timm.create_model(options.model, **model_arguments(options, 1000))
    row = next(facts for facts in ROWS.values() if Path(facts.config).stem == name)
    if row.parameters:
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        stated = float(row.parameters.rstrip("M"))
        # published figures are rounded to a million, or to a tenth
        assert abs(count - stated) <= max(0.03 * stated, 0.6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_shrunken_model_trains_by_its_recipe(name, tmp_path):
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=10).state_dict(), tmp_path / "teacher.pth")
    options = recipe(name)
    small = {"data": "digits", "image_size": 64, "batch_size": 4, "precision": "no", "workers": 0, "cpu": True}
    if options.teacher:
        small |= {"teacher": "mobilenetv3_small_050", "teacher_weights": str(tmp_path / "teacher.pth")}
    if options.mesa:
        small |= {"mesa_start": 0.0}
    run = Run(replace(options, model_arguments=family(options.model).small, **small), None)
    run.network.train()
    batches = iter(run.loader.epoch(0))
    losses = [run.train_step(batches)[0] for _ in range(2)]
    assert all(0 < loss < 20 for loss in losses)
    assert all(parameter.grad is not None for parameter in run.plain.parameters())
