"""The processes of a training run: Accelerate's."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType


def open_processes(cpu: bool, precision: str) -> Accelerator:
    """Join the processes that torchrun or Accelerate launched, or be the only one.

    Args:
        cpu: do not use an accelerator.
        precision: "no" (float32), "bf16" or "fp16".

    Raises:
        ValueError: float16 on a CPU, or a launch that shards the weights by itself.
    """
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    if accelerator.distributed_type is DistributedType.FSDP:
        raise ValueError("the launcher must not shard: launch without FSDP; train_classifier.py has shard=true")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision fp16 needs an accelerator; set precision=bf16 or precision=no for a CPU")
    return accelerator
