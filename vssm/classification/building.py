"""The network, optimizer and schedule that options describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import vssm.models  # noqa: F401
from vssm import zoo

from ..weights import get
from .options import ClassifierOptions

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"opt": "adamw", "betas": (0.9, 0.999), "eps": 1e-8},
    "lamb": {"opt": "lamb", "betas": (0.9, 0.999), "eps": 1e-8},
    "sgd": {"opt": "sgd", "momentum": 0.9},
}


def model_arguments(options: ClassifierOptions, num_classes: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` for the network that the options describe.

    Raises:
        ValueError: no model has this name.
    """
    if not timm.is_model(options.model):
        raise ValueError(f"no model is called {options.model}; run vssm list, or timm.list_models(), to see all")
    # models for one size have positional embeddings or windows that depend on it
    cfg = timm.get_pretrained_cfg(options.model)
    size = {"img_size": options.image_size} if cfg is not None and cfg.fixed_input_size else {}
    return {"num_classes": num_classes, "drop_path_rate": options.drop_path} | size | options.model_arguments


def build_model(options: ClassifierOptions, num_classes: int) -> nn.Module:
    """The network, with the weights it starts from; a distilled one gives both classifiers' logits in training.

    Raises:
        ValueError: no such model, it does not take its arguments, or the weights do not fit.
        WeightsError, OSError: the weights cannot be fetched.
    """
    arguments = model_arguments(options, num_classes)
    if options.weights:
        path = Path(options.weights)
        if not path.exists():
            published = zoo.published("classification")
            if options.weights not in published:
                raise ValueError(f"weights {options.weights}: neither a file nor a row of the zoo; see vssm zoo list")
            path = get(published[options.weights]).path
        # what the file's classifier has is found by timm, which makes a new one for another number of classes
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    try:
        model = timm.create_model(options.model, **arguments)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{options.model} cannot be made with {arguments}: {str(error).splitlines()[0]}") from None
    if options.distillation != "none":
        if not hasattr(model, "set_distilled_training"):
            raise ValueError(f"{options.model} has no second classifier to learn from a teacher; set distillation=none")
        model.set_distilled_training(True)
    if options.checkpoint_gradients:
        model.set_grad_checkpointing(True)
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def build_teacher(options: ClassifierOptions, num_classes: int) -> nn.Module | None:
    """The teacher in evaluation mode, without gradients; None without distillation.

    Raises:
        ValueError: no such model, or its weights do not fit.
        RuntimeError: its published weights cannot be fetched; the message says how to give a file.
    """
    if options.distillation == "none":
        return None
    if not timm.is_model(options.teacher):
        raise ValueError(f"no model is called {options.teacher}; timm.list_models() has the teachers there are")
    given = options.teacher_weights
    try:
        teacher = timm.create_model(
            options.teacher, pretrained=not given, num_classes=num_classes, **options.teacher_arguments
        )
        if given:
            load_checkpoint(teacher, given, weights_only=True)
    # a hub without network, a file that is none
    except Exception as error:
        how = f"correct teacher_weights={given}" if given else "set teacher_weights to a file of them"
        raise ValueError(f"the weights of the teacher {options.teacher} cannot be had ({error}); {how}") from error
    return teacher.eval().requires_grad_(False)


def build_optimizer(options: ClassifierOptions, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """timm's optimizer; biases, one-dimensional parameters and the model's own exemptions do not decay."""
    layers = {"layer_decay": options.layer_decay} if options.layer_decay < 1 else {}
    return create_optimizer_v2(
        model, lr=rate, weight_decay=options.weight_decay, **layers, **_OPTIMIZERS[options.optimizer]
    )


def scaled(options: ClassifierOptions, pictures: int) -> tuple[float, float, float]:
    """(learning_rate, warmup_rate, lowest_rate) for steps of so many pictures."""
    factor = pictures / options.rate_batch if options.rate_batch else 1.0
    return options.learning_rate * factor, options.warmup_rate * factor, options.lowest_rate * factor


class Schedule:
    """timm's cosine with a linear warm-up as a function of the step alone, so that a resumed run needs no state of it.

    Args:
        steps_per_epoch: of the run.
        pictures: of a step, over all processes.
    """

    def __init__(
        self, options: ClassifierOptions, optimizer: torch.optim.Optimizer, steps_per_epoch: int, pictures: int
    ) -> None:
        _, warmup_rate, lowest = scaled(options, pictures)
        self.unit = steps_per_epoch if options.per_epoch else 1
        epochs = options.epochs - (options.warmup_epochs if options.warmup_prefix else 0)
        self.cosine = CosineLRScheduler(
            optimizer,
            t_initial=epochs * steps_per_epoch,
            lr_min=lowest,
            warmup_t=options.warmup_epochs * steps_per_epoch,
            warmup_lr_init=warmup_rate,
            warmup_prefix=options.warmup_prefix,
            t_in_epochs=False,
        )
        self.optimizer = optimizer

    def set(self, step: int) -> float:
        """Set the rates for a step, counted from 0; returns the highest."""
        self.cosine.step_update(step // self.unit * self.unit)
        return max(group["lr"] for group in self.optimizer.param_groups)
