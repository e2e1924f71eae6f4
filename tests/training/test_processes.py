"""What a run refuses of the processes it is launched in."""

import pytest
from accelerate.utils import DistributedType

from vssm.training import processes
from vssm.training.processes import open_processes


def test_a_launcher_that_shards_is_refused(monkeypatch):
    monkeypatch.setattr(processes.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"launch without FSDP.*shard=true"):
        open_processes(True, "no")


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="precision fp16 needs an accelerator"):
        open_processes(True, "fp16")
