"""The options of training a classifier: the keys of configs/imagenet/*.yaml and what they default to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..training.options import Choice, Range

_COUNT = Range(1, 10**7)
_SHARE = Range(0, 1)
_RATE = Range(0, 10)


@dataclass(frozen=True)
class ClassifierOptions:
    """Options of `vssm.classification.fitting.train`; the defaults are those most published recipes agree on.

    Attributes:
        model: name registered with timm.
        model_arguments: of its constructor.
        drop_path: rate of stochastic depth.
        weights: to start from: a file, official or ours, or the name of a row of the zoo; "": random ones.
        data: folder that holds train/ and val/ (or validation/) with a folder of pictures per class; a folder or a name
            as the reader `dataset` of timm wants it; "digits" for scikit-learn's handwritten digits,
            "synthetic" for noise, to measure speed.
        dataset: reader of timm: "" for folders and tar files, "hfds/NAME", "hfids/NAME", "wds", "tfds/NAME"; the NAME
            of Hugging Face is that of the hub or a folder, `data` the cache then.
        train_split, val_split: names of the parts, for such readers.
        num_classes: 0: as many as there are class folders.
        image_size: side of the square pictures, in pixels.
        seed: of weights, order and augmentation.
        epochs: length of the training.
        steps_per_epoch: 0: as many as the pictures give.
        batch_size: pictures of a process.
        accumulation: batches whose gradients make one step.
        optimizer: "adamw", "lamb" or "sgd" (Nesterov, momentum 0.9) of timm.
        learning_rate, warmup_rate, lowest_rate: for `rate_batch` pictures a step; all are scaled in proportion to the
            pictures of a step that there are. `rate_batch` 0: not scaled.
        weight_decay: of all parameters but biases, those of one dimension, and those the model exempts.
        layer_decay: factor of the rate from each layer to the one before; 1: none.
        warmup_epochs: in which the rate rises linearly from warmup_rate.
        warmup_prefix: the cosine starts when they end, rather than having run meanwhile.
        per_epoch: the rate changes between epochs only.
        max_gradient: norm to which longer gradients are cut; 0: never.
        average_decay: share of the exponential moving average of the weights that a step keeps; 0: no average.
        mixup, cutmix: alpha of the beta distributions; 0: none.
        mixup_prob, mixup_switch: shares of the batches that are mixed, and of those that are cut-mixed if both are on.
        smoothing: of the targets.
        loss: "ce" cross entropy or "bce" binary cross entropy of every class.
        auto_augment: timm's text for RandAugment and relatives; "": none.
        color_jitter: strength; timm ignores it where auto_augment is given.
        erase_prob: of random erasing with noise.
        crop_scale, crop_ratio: area and aspect of the random crop.
        flip: horizontally, half of the pictures.
        interpolation: of resizing, "random" draws bilinear or bicubic in training.
        repeats: augmented forms of a picture in an epoch, which has as many fewer pictures.
        crop_pct: side of the crop by the shorter side in validation; 0: the model's.
        distillation: "none"; "hard" or "soft" (arXiv 2012.12877): the model's second classifier learns from a teacher.
        teacher, teacher_arguments, teacher_weights: a model of timm, and a file; "": its published weights.
        distillation_share, distillation_temperature: weight of the teacher's part of the loss; of soft targets.
        mesa: weight of the cross entropy to the averaged model's output (arXiv 2205.13535); 0: none.
        mesa_start: share of the epochs before it counts.
        precision: "no" (float32), "bf16" or "fp16".
        channels_last: memory layout of pictures and weights.
        compile: the network, by torch.compile.
        checkpoint_gradients: recompute blocks in the backward pass to save memory.
        sync_bn: statistics of batch norms over all processes.
        shard: split weights, gradients and the optimizer's state over the processes (FSDP2); for validation and saving,
            and for the average if there is one, each keeps a whole copy of the weights.
        validate_every: epochs between validations; the last epoch is always validated.
        workers: processes that prepare pictures.
        cpu: do not use an accelerator.
    """

    model: str
    data: str
    model_arguments: dict = field(default_factory=dict)
    drop_path: Annotated[float, Range(0, 0.99)] = 0.0
    weights: str = ""
    dataset: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    num_classes: Annotated[int, Range(0, 10**6)] = 0
    image_size: Annotated[int, Range(8, 4096)] = 224
    seed: Annotated[int, Range(0, 2**31)] = 0
    epochs: Annotated[int, _COUNT] = 300
    steps_per_epoch: Annotated[int, Range(0, 10**7)] = 0
    batch_size: Annotated[int, _COUNT] = 128
    accumulation: Annotated[int, Range(1, 1000)] = 1
    optimizer: Annotated[str, Choice(("adamw", "lamb", "sgd"))] = "adamw"
    learning_rate: Annotated[float, _RATE] = 1e-3
    warmup_rate: Annotated[float, _RATE] = 1e-6
    lowest_rate: Annotated[float, _RATE] = 1e-5
    rate_batch: Annotated[int, Range(0, 10**7)] = 1024
    weight_decay: Annotated[float, Range(0, 1)] = 0.05
    layer_decay: Annotated[float, Range(0.01, 1)] = 1.0
    warmup_epochs: Annotated[int, Range(0, 10**6)] = 20
    warmup_prefix: bool = False
    per_epoch: bool = False
    max_gradient: Annotated[float, Range(0, 1e9)] = 5.0
    average_decay: Annotated[float, Range(0, 0.999999)] = 0.9999
    mixup: Annotated[float, Range(0, 100)] = 0.8
    cutmix: Annotated[float, Range(0, 100)] = 1.0
    mixup_prob: Annotated[float, _SHARE] = 1.0
    mixup_switch: Annotated[float, _SHARE] = 0.5
    smoothing: Annotated[float, Range(0, 0.99)] = 0.1
    loss: Annotated[str, Choice(("ce", "bce"))] = "ce"
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: Annotated[float, Range(0, 10)] = 0.0
    erase_prob: Annotated[float, _SHARE] = 0.25
    crop_scale: Annotated[list, Range(0.01, 1, (2,))] = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: Annotated[list, Range(0.01, 100, (2,))] = field(default_factory=lambda: [3 / 4, 4 / 3])
    flip: bool = True
    interpolation: Annotated[str, Choice(("bicubic", "bilinear", "random"))] = "bicubic"
    repeats: Annotated[int, Range(1, 100)] = 1
    crop_pct: Annotated[float, _SHARE] = 0.0
    distillation: Annotated[str, Choice(("none", "hard", "soft"))] = "none"
    teacher: str = ""
    teacher_arguments: dict = field(default_factory=dict)
    teacher_weights: str = ""
    distillation_share: Annotated[float, _SHARE] = 0.5
    distillation_temperature: Annotated[float, Range(0.01, 100)] = 1.0
    mesa: Annotated[float, Range(0, 100)] = 0.0
    mesa_start: Annotated[float, _SHARE] = 0.25
    precision: Annotated[str, Choice(("no", "bf16", "fp16"))] = "no"
    channels_last: bool = False
    compile: bool = False
    checkpoint_gradients: bool = False
    sync_bn: bool = False
    shard: bool = False
    validate_every: Annotated[int, _COUNT] = 1
    workers: Annotated[int, Range(0, 256)] = 0
    cpu: bool = False

    def __post_init__(self) -> None:
        if (self.mixup or self.cutmix) and self.mixup_prob and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair pictures; batch_size must be even, got {self.batch_size}")
        if self.shard and self.precision == "fp16":
            raise ValueError("shard=true goes with precision bf16 or no, not with fp16")
        if self.mesa and not self.average_decay:
            raise ValueError("mesa learns from the averaged model; set average_decay above 0")
        if (self.distillation == "none") != (not self.teacher):
            raise ValueError("distillation needs a teacher, and a teacher needs distillation hard or soft")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")
        if self.crop_scale[0] > self.crop_scale[1] or self.crop_ratio[0] > self.crop_ratio[1]:
            raise ValueError("crop_scale and crop_ratio must be [smallest, largest]")
