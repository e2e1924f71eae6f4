"""Training on two processes: DistributedDataParallel gives the gradients of one process with the whole batch."""

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import vssm  # noqa: F401

WORLD = 2


def model_and_batch():
    torch.manual_seed(0)
    model = timm.create_model("vmamba_tiny", depths=(1, 1), dims=(8, 16), num_classes=3, drop_path_rate=0.0)
    return model, torch.randn(2 * WORLD, 3, 32, 32), torch.arange(2 * WORLD) % 3


def train(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    model, pictures, labels = model_and_batch()
    # Without find_unused_parameters: it would hide a parameter that gets no gradient.
    wrapped = DistributedDataParallel(model)
    mine = slice(2 * rank, 2 * rank + 2)
    cross_entropy(wrapped(pictures[mine]), labels[mine]).backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_the_gradients_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(train, args=(str(tmp_path),), nprocs=WORLD)
    model, pictures, labels = model_and_batch()
    cross_entropy(model(pictures), labels).backward()
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for parameter, gradient in zip(model.parameters(), got, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
