"""Weights, gradients and optimizer state split over the processes (FSDP2, arXiv 2304.11277), and their whole copies.

PyTorch's `fully_shard` is called without Accelerate, which shards on accelerators only: so a CPU can test it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, processes: int) -> None:
    """Split the weights of `network` over all processes, in place; they are whole only while their block runs.

    A block is what a module list called "blocks" holds, as in every model of vssm and most of timm; what is outside
    of blocks stays whole during a step. The forward pass must go through `network(...)`.
    """
    mesh = init_device_mesh(next(network.parameters()).device.type, (processes,))
    for name, module in list(network.named_modules()):
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


@torch.no_grad()
def gather(network: nn.Module, whole: nn.Module, gradients: bool = False) -> None:
    """Copy weights and buffers of the sharded `network` to `whole`, the same network without shards; all must call it.

    Buffers (statistics of batch norms) are not sharded: they are those of the process. `gradients` are copied if asked.
    """
    for part, copy in zip(network.modules(), whole.modules(), strict=True):
        if isinstance(part, FSDPModule):
            part.unshard()
            for weight, target in zip(part.parameters(), copy.parameters(), strict=True):
                # blocks within are still sharded, it is their turn later
                if not isinstance(weight, DTensor):
                    target.copy_(weight)
            part.reshard()
    for buffer, target in zip(network.buffers(), whole.buffers(), strict=True):
        target.copy_(buffer)
    if gradients:
        for weight, target in zip(network.parameters(), whole.parameters(), strict=True):
            target.grad = None if weight.grad is None else weight.grad.full_tensor()


def scatter(whole: nn.Module, network: nn.Module) -> None:
    """Copy weights and buffers of `whole`, the same on every process, to the sharded `network`; all must call it."""
    set_model_state_dict(network, whole.state_dict(), options=StateDictOptions(full_state_dict=True))


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer of sharded weights as it would be without shards, on the CPU; all must call it."""
    entries = {
        index: {
            name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return state | {"state": entries}


def sharded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `whole_state` returned, split as the weights of `optimizer` are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def split(value: Any, weight: DTensor) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
            return value
        # every process holds the whole: nothing needs to be sent
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    entries = {
        index: {name: split(value, weights[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return state | {"state": entries}
