"""What a figure was measured on."""

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Kind and model of a device: "cuda: NVIDIA H100", "cpu: AMD EPYC"."""
    return f"{device.type}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()
