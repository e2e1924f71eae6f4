"""The learning rate as a function of time alone, so that a resumed run needs no state of it.

timm's schedulers restart a cosine at its end; VM-UNet's recipe lets it rise again, as PyTorch's does.
"""

import math

from .options import TrainingOptions


def rate_at(step: int, options: TrainingOptions) -> float:
    """Learning rate of a step.

    With t the time in epochs, T their number, r the learning rate and m the lowest:
    - poly: m + (r - m) (1 - t / T)^power;
    - cosine: m + (r - m) (1 + cos(pi t / H)) / 2, H = cosine_epochs or T: beyond H it rises again;
    - before that warmup_epochs in which it rises linearly; t counts from their end.

    Args:
        step: from 0.
    """
    time = step / options.steps_per_epoch
    if options.per_epoch:
        time = math.floor(time)
    warmup = options.warmup_epochs
    if time < warmup:
        return options.learning_rate * (time + 1 / options.steps_per_epoch) / warmup
    time, whole = time - warmup, max(options.epochs - warmup, 1)
    if options.schedule == "poly":
        share = max(1 - time / whole, 0.0) ** options.poly_power
    else:
        share = (1 + math.cos(math.pi * time / (options.cosine_epochs or whole))) / 2
    return options.lowest_rate + (options.learning_rate - options.lowest_rate) * share
