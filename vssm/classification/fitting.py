"""The training run of a classifier: from options and pictures to checkpoints, records and drawings, resumable anywhere.

Letters: B is the batch of a process, K the classes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..atomic import replaced_file
from ..training.checkpoints import (
    checkpoint_to_resume,
    random_state,
    save_checkpoint,
    set_random_state,
    state_of_process,
)
from ..training.diagnosis import TrainingError, check_weights, describe_failure
from ..training.interruption import Interruption
from ..training.processes import open_processes
from ..training.records import Records, draw_curves
from .building import Schedule, build_model, build_optimizer, build_teacher, model_arguments, scaled
from .data import open_parts
from .drawing import draw_confusion
from .evaluating import evaluate
from .folders import plain
from .loading import TrainingLoader, data_config, training_transform, validation_loader, validation_transform
from .objective import Objective, make_mixup
from .options import ClassifierOptions
from .sharding import gather, scatter, shard, sharded_state, whole_state
from .trained import Trained, write_trained

LAST, BEST, CONFIG = "last.pt", "best.safetensors", "config.yaml"
COLUMNS = ("epoch", "loss", "learning_rate", "gradient_norm", "top1", "top5", "validation_loss", "average_top1")
_AMP = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# options that a resumed run may change: they do not touch the numbers
_FREE_OPTIONS = ("workers",)
_NEEDED_TO_RESUME = ("network", "optimizer", "random", "step", "epochs", "best")


@dataclass(frozen=True)
class Moment:
    """For a progress bar: finished steps of all, loss, pictures a second so far in the epoch, share of time waited."""

    step: int
    steps: int
    loss: float
    pictures_per_second: float
    waited: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the signal that stopped it or None, finished steps, best top-1 in validation in percent."""

    signal: int | None
    steps: int
    best_top1: float


def train(
    options: ClassifierOptions,
    output: Path,
    resume: bool = False,
    on_step: Callable[[Moment], None] = lambda moment: None,
    progress: Callable[[Iterable], Iterable] = lambda batches: batches,
) -> Outcome:
    """Train, or continue to, and write everything under `output`.

    Args:
        output: folder of the run; it gets config.yaml, last.pt, best.safetensors (the better of the network and its
            average, for `timm.create_model(..., checkpoint_path=)`), metrics.csv, tensorboard/, curves.png and
            confusion.png.
        resume: continue from last.pt; if a run was killed before its first checkpoint, start it anew.
        on_step: called on the main process.
        progress: wraps the batches of a validation.

    Raises:
        ValueError: data or options cannot be used; a run is there already.
        TrainingError: numbers that are not finite; last.pt stays that of the last finished epoch, and the batch is in
            bad_batch.pt.
    """
    return Run(options, output, resume, progress)(on_step)


class _Stopped(Exception):
    """A signal asked one of the processes to stop; all leave."""


class Run:
    """The state of a training run in one process.

    Args:
        output: None trains without any record, for measuring `train_step`.
    """

    def __init__(
        self,
        options: ClassifierOptions,
        output: Path | None,
        resume: bool = False,
        progress: Callable[[Iterable], Iterable] = lambda batches: batches,
    ) -> None:
        self.options, self.output, self.progress = options, output, progress
        self.accelerator = open_processes(options.cpu, options.precision)
        accelerator, rank, processes = self.accelerator, self.accelerator.process_index, self.accelerator.num_processes
        if options.shard and processes == 1:
            raise ValueError("shard=true splits weights over processes; launch several with torchrun, or set it false")
        pictures, held_out, self.classes = open_parts(options)
        num_classes = options.num_classes or len(self.classes)
        if not num_classes or num_classes < len(self.classes):
            found = f"{len(self.classes)} classes" if self.classes else "classes without names; give their number"
            raise ValueError(f"num_classes is {options.num_classes}, the data have {found}")
        pin = accelerator.device.type == "cuda"
        self.loader = TrainingLoader(pictures, options, rank, processes, pin)
        checkpoint = None
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            begun = output / CONFIG
            checkpoint = checkpoint_to_resume(output / LAST, resume, begun, options, _FREE_OPTIONS, _NEEDED_TO_RESUME)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                with replaced_file(begun) as stream:
                    stream.write(yaml.safe_dump(dataclasses.asdict(options), sort_keys=False).encode())
        set_seed(options.seed)
        self.arguments = model_arguments(options, num_classes)
        network = build_model(options, num_classes)
        if options.sync_bn and processes > 1 and accelerator.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.config = data_config(options, network)
        pictures.transform = training_transform(options, self.config)
        held_out.transform = validation_transform(self.config)
        self.held_out, self.validation = len(held_out), validation_loader(held_out, options, rank, processes, pin)
        self.pictures_per_step = options.batch_size * options.accumulation * processes
        self.rate = scaled(options, self.pictures_per_step)[0]
        # `plain` has the whole weights and no wrapper: the network itself, or a copy that follows the shards
        if options.shard:
            self.network = network.to(accelerator.device)
            self.plain = copy.deepcopy(self.network)
            shard(self.network, processes)
            self.optimizer = accelerator.prepare(build_optimizer(options, self.network, self.rate))
        else:
            self.network, self.optimizer = accelerator.prepare(network, build_optimizer(options, network, self.rate))
            self.plain = accelerator.unwrap_model(self.network)
        self.schedule = Schedule(options, self.optimizer, self.loader.steps, self.pictures_per_step)
        self.average = ModelEmaV3(self.plain, decay=options.average_decay) if options.average_decay else None
        teacher = build_teacher(options, num_classes)
        self.objective = Objective(
            options,
            None if teacher is None else teacher.to(accelerator.device),
            None if self.average is None else self.average.module,
            accelerator.autocast,
        )
        self.mixup = make_mixup(options, num_classes)
        # mixing and dropout differ between processes
        set_seed(options.seed + rank)
        self.step, self.epochs, self.best, self.losses, self.norms = 0, 0, -math.inf, [], []
        # pictures a second and share of the time waited for them; nothing where an epoch was finished by another run
        self.speed: tuple[float, ...] = ()
        self.waited = 0.0
        self.last = options.epochs * self.loader.steps
        if checkpoint is not None:
            self._restore(checkpoint)
        if options.compile:
            self.network.compile()
        if output is not None and accelerator.is_main_process:
            self.records = Records(output, COLUMNS, self.epochs)

    def __call__(self, on_step: Callable[[Moment], None]) -> Outcome:
        try:
            with Interruption() as self.interruption:
                try:
                    while self.epochs < self.options.epochs:
                        self._train_epoch(on_step)
                        self._finish_epoch()
                except _Stopped:
                    self._save()
                    return Outcome(self.interruption.signal, self.step, self.best)
                with suppress(_Stopped):
                    self._draw()
                return Outcome(self.interruption.signal, self.step, self.best)
        finally:
            if self.accelerator.is_main_process:
                self.records.close()

    def _train_epoch(self, on_step: Callable[[Moment], None]) -> None:
        """Train to the end of the epoch, or until a signal asks one of the processes to stop."""
        steps = self.loader.steps
        done = self.step - self.epochs * steps
        batches = iter(self.loader.epoch(self.epochs, done))
        self.network.train()
        begun, self.waited = time.perf_counter(), 0.0
        for count in range(1, steps - done + 1):
            loss, asked = self.train_step(batches, self.interruption.requested)
            self.step += 1
            seconds = time.perf_counter() - begun
            self.speed = count * self.pictures_per_step / seconds, self.waited / seconds
            if self.accelerator.is_main_process:
                on_step(Moment(self.step, self.last, loss, *self.speed))
            if asked:
                raise _Stopped

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]], stop: bool = False) -> tuple[float, bool]:
        """One step; returns its loss and whether any process wants to `stop`.

        Args:
            batches: gives images (B, 3, H, W) and classes (B,).

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        options, accelerator = self.options, self.accelerator
        rate = self.schedule.set(self.step)
        self.optimizer.zero_grad()
        # the wish to stop travels with the loss: all processes leave at the same step
        total = torch.zeros(2, device=accelerator.device)
        for part in range(options.accumulation):
            images, targets = self._next(batches)
            # gradients of several processes are added up with the last part
            with self._without_sync() if part + 1 < options.accumulation else nullcontext():
                outputs, loss = self._forward(images, targets)
                accelerator.backward(loss / options.accumulation)
            total[0] += loss.detach() / options.accumulation
        total[1] = float(stop)
        total = accelerator.reduce(total, "mean")
        norm = float(accelerator.clip_grad_norm_(self.network.parameters(), options.max_gradient or math.inf))
        mean, asked = total.tolist()
        # with float16 an infinite gradient is no failure: the step is left out and the scale halved
        if not math.isfinite(mean) or (accelerator.scaler is None and not math.isfinite(norm)):
            raise TrainingError(self._failure(rate, images, targets, outputs, loss))
        self.optimizer.step()
        if self.average is not None:
            self._gather()
            self.average.update(self.plain, step=self.step + 1)
        self.losses.append(mean)
        if math.isfinite(norm):
            self.norms.append(norm)
        return mean, asked > 0

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        """Gradients stay where they were made, to be added up with those of a later backward pass."""
        if not self.options.shard:
            with self.accelerator.no_sync(self.network):
                yield
            return
        self.network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.network.set_requires_gradient_sync(True)

    def _gather(self, gradients: bool = False) -> None:
        """Bring `plain` up to date with shards, if there are some."""
        if self.options.shard:
            gather(self.network, self.plain, gradients)

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The next batch, on the device, mixed."""
        begun = time.perf_counter()
        try:
            images, targets = next(batches)
        except StopIteration:
            raise ValueError(
                f"the data end after {self.step % self.loader.steps} of {self.loader.steps} steps of an epoch; set "
                "steps_per_epoch"
            ) from None
        except ValueError as error:
            raise plain(error) from None
        self.waited += time.perf_counter() - begun
        device = self.accelerator.device
        layout = torch.channels_last if self.options.channels_last else torch.preserve_format
        images = images.to(device, non_blocking=True, memory_format=layout)
        targets = targets.to(device, non_blocking=True)
        return (images, targets) if self.mixup is None else self.mixup(images, targets)

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        with self.accelerator.autocast():
            outputs = self.network(images)
        # the loss of half precision is taken in float32
        outputs = [output.float() for output in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]
        return outputs, self.objective(outputs, targets, images, self.step / self.last)

    def _failure(self, rate: float, images: Tensor, targets: Tensor, outputs: list[Tensor], loss: Tensor) -> str:
        """Save the batch and say what broke."""
        self._gather(gradients=True)
        said = describe_failure(self.step + 1, rate, self.plain, images, outputs, loss.detach())
        if self.output is None:
            return said
        rank = self.accelerator.process_index
        path = self.output / ("bad_batch.pt" if rank == 0 else f"bad_batch_{rank}.pt")
        save_checkpoint({"images": images.cpu(), "targets": targets.cpu(), "step": self.step}, path)
        return f"{said} (the batch is in {path}, the last good state in {self.output / LAST})"

    def _finish_epoch(self) -> None:
        """Validate if it is time, record, and save."""
        options, epoch = self.options, self.epochs + 1
        self._gather()
        check_weights(self.plain, self.step)
        row = {
            "epoch": epoch,
            "loss": float(np.mean(self.losses)),
            "learning_rate": self.schedule.set(self.step - 1),
        }
        if self.norms:
            row["gradient_norm"] = float(np.mean(self.norms))
        better = None
        if epoch % options.validate_every == 0 or epoch == options.epochs:
            rated = self._validate(self.plain)
            row |= {"top1": rated["top1"], "top5": rated["top5"], "validation_loss": rated["loss"]}
            candidates = [(row["top1"], self.plain)]
            if self.average is not None:
                row["average_top1"] = self._validate(self.average.module)["top1"]
                candidates.append((row["average_top1"], self.average.module))
            top1, model = max(candidates, key=lambda candidate: candidate[0])
            if top1 > self.best:
                self.best, better = top1, model
        # only now: a validation that a signal stops is repeated by the resumed run
        self.epochs, self.losses, self.norms = epoch, [], []
        # the row before the weights: a row without weights is dropped by --resume, weights without a row would lack it
        if self.accelerator.is_main_process:
            # not in the file, which is the same for the same run
            measured = dict(zip(("pictures_per_second", "waited_for_data"), self.speed, strict=False))
            self.records.add(row | measured)
            if better is not None:
                facts = Trained(self.options.model, self.arguments, self.classes, self.config, self.best, epoch)
                write_trained(self.output / BEST, better, facts)
        self._save()

    def _validate(self, model: nn.Module, confusion: Tensor | None = None) -> dict[str, float]:
        """Rates over all validation pictures, on every process."""
        if self.accelerator.num_processes > 1:
            # statistics of batch norms differ between processes; those of the first are saved
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        loader, amp = self._until_stopped(self.progress(self.validation)), _AMP[self.options.precision]
        try:
            part = evaluate(model, loader, self.accelerator.device, amp, confusion=confusion)
        except FloatingPointError as error:
            raise TrainingError(f"validation after step {self.step}: {error}") from None
        except ValueError as error:
            raise plain(error) from None
        except _Stopped:
            part = None
        parts = gather_object([part]) if self.accelerator.num_processes > 1 else [part]
        if None in parts:
            raise _Stopped
        count = sum(part["count"] for part in parts)
        return {name: sum(part[name] * part["count"] for part in parts) / count for name in ("top1", "top5", "loss")}

    def _until_stopped(self, batches: Iterable) -> Iterator:
        for batch in batches:
            if self.interruption.requested:
                raise _Stopped
            yield batch

    def _save(self) -> None:
        states = [random_state()]
        if self.accelerator.num_processes > 1:
            states = gather_object(states)
        self._gather()
        optimizer = self.optimizer.state_dict()
        if self.options.shard:
            optimizer = whole_state(optimizer)
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "network": self.plain.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": states,
            "options": dataclasses.asdict(self.options),
            "step": self.step,
            "epochs": self.epochs,
            "best": self.best,
            "losses": self.losses,
            "norms": self.norms,
        }
        save_checkpoint(state, self.output / LAST)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        accelerator = self.accelerator
        state = state_of_process(
            checkpoint["random"], self.output, accelerator.process_index, accelerator.num_processes
        )
        self.plain.load_state_dict(checkpoint["network"])
        optimizer = checkpoint["optimizer"]
        if self.options.shard:
            scatter(self.plain, self.network)
            optimizer = sharded_state(optimizer, self.optimizer)
        self.optimizer.load_state_dict(optimizer)
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint["average"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.epochs, self.best = checkpoint["step"], checkpoint["epochs"], checkpoint["best"]
        self.losses, self.norms = checkpoint["losses"], checkpoint["norms"]
        set_random_state(state)

    def _draw(self) -> None:
        """Curves, and what the best network takes for what."""
        self.plain.load_state_dict(load_file(self.output / BEST))
        confusion = torch.zeros(2 * (self.arguments["num_classes"],), dtype=torch.int64)
        self._validate(self.plain, confusion)
        confusion = self.accelerator.reduce(confusion.to(self.accelerator.device)).cpu()
        if self.accelerator.is_main_process:
            panels = {
                "loss": ["loss", "validation_loss"],
                "top-1 in validation, %": ["top1", *(["average_top1"] if self.average is not None else [])],
                "learning rate": ["learning_rate"],
            }
            draw_curves(self.records.path, panels, self.output / "curves.png")
            draw_confusion(confusion, self.classes, self.output / "confusion.png")
