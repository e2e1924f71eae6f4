"""The training run: from options and a folder to checkpoints, records and pictures, resumable at any moment.

Patch number ((step x accumulation + a) x processes + rank) x batch + i is patch i of accumulation a of that step: two
processes see what one process with twice the batch sees. Letters: B is the batch, C the channels, K the labels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..training.checkpoints import (
    checkpoint_to_resume,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    state_of_process,
)
from ..training.diagnosis import TrainingError, check_weights, describe_failure
from ..training.interruption import Interruption
from ..training.processes import open_processes
from ..training.records import Records, draw_curves
from ..volumes.errors import VolumeError
from ..volumes.training import dice_scores
from .augmentation import Augmentation
from .datasets import read_dataset, split_folds
from .drawing import DrawnCase, draw_worst_cases
from .network import build_network, define_network, make_loss
from .options import TrainingOptions
from .patches import PatchDataset
from .planning import activation_bytes, fitting_patch
from .preparing import prepare_cases
from .schedule import rate_at
from .setting_up import device_memory, obtain_plan
from .validating import case_dice, mean_dice, one_output, predict_case

LAST, BEST = "last.pt", "best.pt"
# options that a resumed run may change: they do not touch the numbers
_FREE_OPTIONS = ("workers", "worst_cases", "memory_gb")
_NEEDED_TO_RESUME = ("iterate", "optimizer", "random", "plan", "step")


@dataclass(frozen=True)
class Moment:
    """For a progress bar: finished steps of all, the loss of the step, and the Dice of each label in its patches."""

    step: int
    steps: int
    loss: float
    dice: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: whether it was interrupted, finished steps, and the best mean Dice in validation."""

    interrupted: bool
    steps: int
    best_dice: float


def train(
    options: TrainingOptions,
    output: Path,
    resume: bool = False,
    on_step: Callable[[Moment], None] = lambda moment: None,
    progress: Callable[[Iterable], Iterable] = lambda cases: cases,
) -> Outcome:
    """Train, or continue to, and write everything under `output`.

    Args:
        output: folder of the run; it gets plan.yaml, cache/, last.pt, best.pt, metrics.csv, tensorboard/, curves.png
            and worst_cases.png. A plan.yaml that is there is used.
        resume: continue from last.pt; if a run was killed before its first checkpoint, start it anew.
        on_step: called on the main process.
        progress: wraps lists of cases while they are read.

    Raises:
        VolumeError, ValueError: data, plan or options cannot be used; a run is there already; too little memory.
        TrainingError: numbers that are not finite; last.pt stays that of the last finished epoch, and the batch is in
            bad_batch.pt.
    """
    return Run(options, output, resume, progress)(on_step)


class Run:
    """The state of a training run in one process."""

    def __init__(
        self, options: TrainingOptions, output: Path, resume: bool, progress: Callable[[Iterable], Iterable]
    ) -> None:
        self.options, self.output = options, output
        self.accelerator = open_processes(options.cpu, options.precision)
        self.dataset = read_dataset(options.data, options.channels, options.labels, options.label_suffix)
        cases = split_folds(self.dataset.cases, options.folds, options.fold, options.seed)
        output.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoint_to_resume(
            output / LAST, resume, output / "plan.yaml", options, _FREE_OPTIONS, _NEEDED_TO_RESUME
        )
        # the first process plans and prepares, the others wait and read
        with self.accelerator.main_process_first():
            self.plan = obtain_plan(options, self.dataset, output, self.accelerator.device, progress)
            self.training, self.validation = (
                prepare_cases(part, self.dataset, self.plan, output / "cache", progress) for part in cases
            )
        self._check_memory()
        torch.manual_seed(options.seed)
        self.definition = define_network(options, self.plan, self.dataset)
        network = build_network(self.definition)
        if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        optimizer = create_optimizer_v2(
            network,
            opt=options.optimizer,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            filter_bias_and_bn=False,
            **({"momentum": options.momentum} if options.optimizer == "sgd" else {}),
        )
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.plain = self.accelerator.unwrap_model(self.network)
        self._check_network()
        self.average = ModelEmaV3(self.plain, decay=options.average_decay) if options.average_decay else None
        self.loss_of = make_loss(options)
        # dropout differs between processes
        torch.manual_seed(options.seed + self.accelerator.process_index)
        self.step, self.best, self.losses, self.norms = 0, -math.inf, [], []
        if checkpoint is not None:
            self._restore(checkpoint)
        augmentation = None
        if options.augmentation != "none":
            augmentation = Augmentation(options.augmentation, self.plan, options.mirror_axes)
        self.patches = PatchDataset(self.training, self.plan, options.seed, options.foreground_share, augmentation)
        if self.accelerator.is_main_process:
            self.dice_columns = [f"dice_{name}" for name in self.dataset.labels[1:]]
            columns = ["epoch", "loss", "learning_rate", "gradient_norm", "dice", *self.dice_columns]
            self.records = Records(output, columns, self.step // options.steps_per_epoch)

    def __call__(self, on_step: Callable[[Moment], None]) -> Outcome:
        options = self.options
        last = options.epochs * options.steps_per_epoch
        try:
            with Interruption() as interruption:
                while self.step < last:
                    if self._train_epoch(on_step, interruption):
                        self._save()
                        return Outcome(True, self.step, self.best)
                    self._finish_epoch()
        finally:
            if self.accelerator.is_main_process:
                self.records.close()
        self._draw()
        return Outcome(False, self.step, self.best)

    def _train_epoch(self, on_step: Callable[[Moment], None], interruption: Interruption) -> bool:
        """Train to the end of the epoch; True if a signal asked to stop before."""
        options, accelerator = self.options, self.accelerator
        end = (self.step // options.steps_per_epoch + 1) * options.steps_per_epoch
        batches = iter(self._batches(self.step, end))
        self.network.train()
        while self.step < end:
            # several processes must agree to stop: they look at the end of an epoch only
            if interruption.requested and accelerator.num_processes == 1:
                return True
            try:
                loss, dice = self._train_step(batches)
            except torch.OutOfMemoryError:
                raise VolumeError(self._too_large()) from None
            self.step += 1
            if accelerator.is_main_process:
                on_step(Moment(self.step, options.epochs * options.steps_per_epoch, loss, dice))
        asked = torch.tensor(float(interruption.requested), device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum") > 0) and self._stop_after_epoch()

    def _stop_after_epoch(self) -> bool:
        self._finish_epoch()
        return True

    def _train_step(self, batches: Iterable[tuple[Tensor, Tensor, tuple[str, ...]]]) -> tuple[float, tuple[float, ...]]:
        options, accelerator = self.options, self.accelerator
        rate = rate_at(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        total = torch.zeros((), device=accelerator.device)
        for part in range(options.accumulation):
            images, labels, names = next(batches)
            batch = images.to(accelerator.device), labels.to(accelerator.device), names
            # gradients of several processes are added up with the last part
            wait = part + 1 < options.accumulation
            with accelerator.no_sync(self.network) if wait else nullcontext():
                outputs, loss = self._forward(*batch[:2])
                accelerator.backward(loss / options.accumulation)
            total += loss.detach() / options.accumulation
        total = accelerator.reduce(total, "mean")
        norm = accelerator.clip_grad_norm_(self.network.parameters(), options.max_gradient)
        if not (torch.isfinite(total) and torch.isfinite(norm)):
            raise TrainingError(self._failure(rate, batch, outputs, loss))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.plain, step=self.step + 1)
        self.losses.append(total.item())
        self.norms.append(norm.item())
        return self.losses[-1], dice_scores(outputs[0].argmax(dim=1), batch[1][:, 0], len(self.dataset.labels))

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        with self.accelerator.autocast():
            outputs = self.network(images)
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        return outputs, self.loss_of(outputs, labels)

    def _failure(self, rate: float, batch: tuple[Tensor, Tensor, tuple], outputs: list[Tensor], loss: Tensor) -> str:
        """Save the batch and say what broke."""
        rank = self.accelerator.process_index
        path = self.output / ("bad_batch.pt" if rank == 0 else f"bad_batch_{rank}.pt")
        images, labels, names = batch
        save_checkpoint({"images": images.cpu(), "labels": labels.cpu(), "cases": list(names), "step": self.step}, path)
        said = describe_failure(self.step + 1, rate, self.plain, images, outputs, loss.detach())
        return f"{said} (cases {', '.join(names)}; the batch is in {path}, the last good state in {self.output / LAST})"

    def _batches(self, first: int, end: int) -> DataLoader:
        """This process's batches of the steps `first` to `end`, in order."""
        batch, parts, processes = self.plan.batch_size, self.options.accumulation, self.accelerator.num_processes
        rank = self.accelerator.process_index
        starts = [(turn * processes + rank) * batch for turn in range(first * parts, end * parts)]
        return DataLoader(
            self.patches,
            batch_sampler=[range(start, start + batch) for start in starts],
            num_workers=self.options.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            collate_fn=_collate,
            # workers must not draw from the generator whose state is part of the checkpoint
            generator=torch.Generator(),
        )

    def _finish_epoch(self) -> None:
        """Validate if it is time, record, and save."""
        options, epoch = self.options, self.step // self.options.steps_per_epoch
        check_weights(self.plain, self.step)
        row = {
            "epoch": epoch,
            "loss": float(np.mean(self.losses)),
            "learning_rate": rate_at(self.step - 1, options),
            "gradient_norm": float(np.mean(self.norms)),
        }
        self.losses, self.norms = [], []
        better = False
        if epoch % options.validate_every == 0 or epoch == options.epochs:
            dice = mean_dice([score for _, score in self._validate()])
            rated = [score for score in dice if not math.isnan(score)]
            row["dice"] = float(np.mean(rated)) if rated else 0.0
            row |= dict(zip((f"dice_{name}" for name in self.dataset.labels[1:]), dice, strict=True))
            better = row["dice"] > self.best
            self.best = max(self.best, row["dice"])
        # the row before the weights: a row without weights is dropped by --resume, weights without a row would lack it
        if self.accelerator.is_main_process:
            self.records.add({name: value for name, value in row.items() if not math.isnan(value)})
        if better:
            self._save_best()
        self._save()

    def _validate(self) -> list[tuple[int, list[float]]]:
        """(index of the validation case, Dice of each label) of all of them, on every process."""
        network = self.plain if self.average is None else self.average.module
        device, rank, processes = (
            self.accelerator.device,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        found = []
        for index in range(rank, len(self.validation), processes):
            case = self.validation[index]
            with self.accelerator.autocast():
                predicted = predict_case(network, case, self.plan, self.options.overlap, device)
            truth = torch.from_numpy(np.array(case.labels))
            found.append((index, case_dice(predicted, truth, len(self.dataset.labels))))
        return sorted(gather_object(found)) if processes > 1 else found

    def _weights(self) -> dict[str, Any]:
        """What a finished network is made of, for validation and export."""
        network = self.plain if self.average is None else self.average.module
        return {
            "network": network.state_dict(),
            "definition": self.definition,
            "plan": dataclasses.asdict(self.plan),
            "dataset": {
                "name": self.dataset.name,
                "channels": list(self.dataset.channels),
                "labels": list(self.dataset.labels),
                "pictures": self.dataset.is_pictures,
            },
            "options": dataclasses.asdict(self.options),
            "step": self.step,
            "dice": self.best,
        }

    def _save_best(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(self._weights(), self.output / BEST)

    def _save(self) -> None:
        states = [random_state()]
        if self.accelerator.num_processes > 1:
            states = gather_object(states)
        if not self.accelerator.is_main_process:
            return
        running = {
            "iterate": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": states,
            "losses": self.losses,
            "norms": self.norms,
        }
        save_checkpoint(self._weights() | running, self.output / LAST)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["plan"] != dataclasses.asdict(self.plan):
            raise ValueError(
                f"{self.output / 'plan.yaml'} was changed since the run began; undo it or start another run"
            )
        self.plain.load_state_dict(checkpoint["iterate"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint["network"])
        accelerator = self.accelerator
        state = state_of_process(
            checkpoint["random"], self.output, accelerator.process_index, accelerator.num_processes
        )
        self.step, self.best = checkpoint["step"], checkpoint["dice"]
        self.losses, self.norms = checkpoint["losses"], checkpoint["norms"]
        set_random_state(state)

    def _check_network(self) -> None:
        """Raise ValueError unless the network takes a patch and returns a channel per label on the same grid."""
        size, name = self.plan.network_size, self.definition["_target_"]
        patch = torch.zeros(1, len(self.dataset.channels), *size, device=self.accelerator.device)
        try:
            with one_output(self.plain), torch.inference_mode(), self.accelerator.autocast():
                logits = self.plain(patch)
        # what networks raise for a size that they cannot take; theirs that are ValueErrors say which they can
        except (RuntimeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise VolumeError(self._too_large()) from None
            raise ValueError(f"{name} fails for a patch of {size} ({error}); choose another patch_size") from None
        expected = (1, len(self.dataset.labels), *size)
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != expected:
            raise ValueError(
                f"{name} returns {found} for a patch of {size}, {expected} is needed; choose another patch_size or "
                "correct network_arguments"
            )

    def _check_memory(self) -> None:
        self.available = device_memory(self.accelerator.device)
        if self.available is not None and self._needed() > self.available:
            raise VolumeError(self._too_large())

    def _needed(self) -> int:
        plan = self.plan
        labels = len(self.dataset.labels)
        return activation_bytes(plan.patch_size, plan.spacing, plan.batch_size, self.options.precision, labels)

    def _too_large(self) -> str:
        needed = self._needed()
        # where the estimate said that it fits, it was too low
        share = 0.7 if self.available is None else min(0.7, self.available / needed)
        return (
            f"a batch of {self.plan.batch_size} patches of {self.plan.patch_size} needs about {needed / 1e9:.1f} "
            f"GB, more than {self.accelerator.device} has left; by estimate patch_size "
            f"{fitting_patch(self.plan, share)} fits"
        )

    def _draw(self) -> None:
        """Curves, and the worst validation cases of the best network."""
        if not self.accelerator.is_main_process:
            return
        panels = {
            "loss": ["loss"],
            "Dice in validation": ["dice", *self.dice_columns],
            "learning rate": ["learning_rate"],
        }
        draw_curves(self.records.path, panels, self.output / "curves.png")
        network = build_network(self.definition).to(self.accelerator.device)
        network.load_state_dict(load_checkpoint(self.output / BEST)["network"])
        scored = []
        for case in self.validation:
            predicted = predict_case(network, case, self.plan, self.options.overlap, self.accelerator.device)
            scores = case_dice(predicted, torch.from_numpy(np.array(case.labels)), len(self.dataset.labels))
            rated = [score for score in scores if not math.isnan(score)]
            scored.append((float(np.mean(rated)) if rated else 1.0, case, predicted))
            # the pictures of the others are not kept
            scored = sorted(scored, key=lambda entry: entry[0])[: self.options.worst_cases]
        drawn = [
            DrawnCase(case.name, case.image, np.array(case.labels), predicted.numpy(), self.plan.spacing, dice)
            for dice, case, predicted in scored
        ]
        draw_worst_cases(drawn, self.dataset.labels, self.output / "worst_cases.png", self.dataset.is_pictures)


def _collate(patches: list[tuple[Tensor, Tensor, str]]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    images, labels, names = zip(*patches, strict=True)
    return torch.stack(images), torch.stack(labels), names
