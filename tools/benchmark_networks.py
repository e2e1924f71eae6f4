"""Benchmarks of 3-D networks against MONAI's: time and memory of inference on one volume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measuring import peak_memory, take_turns
from monai.networks.nets import SwinUNETR

from vssm.networks import SegMamba, UMambaBot

CLASSES = 4
# nnU-Net's plan for a patch of this size on a card of 8 GB
UMAMBA = {
    "features": [32, 64, 128, 256, 320],
    "strides": [1, 2, 2, 2, 2],
    "kernel_sizes": [3] * 5,
    "num_blocks": [2] * 5,
    "num_decoder_blocks": [2] * 4,
}
# Name -> constructor, from the channels of the image. The first is the measure of the others.
NETWORKS: dict[str, Callable[[int], torch.nn.Module]] = {
    "SwinUNETR": lambda channels: SwinUNETR(in_channels=channels, out_channels=CLASSES, feature_size=48),
    "SegMamba": lambda channels: SegMamba(channels, CLASSES),
    "U-Mamba Bot": lambda channels: UMambaBot(3, channels, CLASSES, **UMAMBA),
    "U-Mamba Bot without Mamba": lambda channels: UMambaBot(3, channels, CLASSES, **UMAMBA, mixer="none"),
}


def network_call(name: str, channels: int, size: int, device: str) -> Callable[[], Any]:
    """Inference of a network on a random cube of `size` voxels a side as a call without arguments, float32."""
    torch.manual_seed(0)
    network = NETWORKS[name](channels).to(device).eval()
    volume = torch.randn(1, channels, size, size, size, device=device)

    def infer() -> None:
        with torch.inference_mode():
            network(volume)

    return infer


def speed(channels: int, size: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of times of each network; ratios are to the first."""
    calls = {name: network_call(name, channels, size, device.type) for name in NETWORKS}
    times = take_turns(calls, device, least=3, most=10)
    first = next(iter(NETWORKS))
    return [
        {"network": name, "size": size, "channels": channels, "ms": time}
        | {f"time / {first}": f"{time.median / times[first].median:.2f}"}
        for name, time in times.items()
    ]


def memory(channels: int, size: int, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """Rows of the memory of inference beyond weights and volume; ratios are to the first network."""
    peaks = {name: peak_memory(network_call, (name, channels, size, device.type), threads) for name in NETWORKS}
    first = next(iter(NETWORKS))
    return [
        {"network": name, "size": size, "channels": channels, "GB": f"{peak / 1e9:.3f}"}
        | {f"memory / {first}": f"{peak / peaks[first]:.2f}"}
        for name, peak in peaks.items()
        if peak is not None
    ]
