"""A MONAI bundle around a tiny untrained network, for tests that need one on disk."""

import json
from pathlib import Path

import torch
from monai.networks.nets import UNet
from safetensors.torch import save_file

_NETWORK = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2]}
INFERENCE = {
    "network_def": {"_target_": "monai.networks.nets.UNet", **_NETWORK},
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [2.0, 2.0, 2.0], "mode": "bilinear"},
            {"_target_": "NormalizeIntensityd", "keys": "image"},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16], "overlap": 0.5, "mode": "gaussian"},
}
METADATA = {
    "network_data_format": {
        "outputs": {"pred": {"channel_def": {"0": "background", "1": "grey matter", "2": "white matter"}}}
    },
    "learned_from": {"field_of_view_mm": [180, 220, 180], "foreground_ml": 1500},
}


def write_bundle(folder: Path, channels: int = 1, seed: int = 0) -> Path:
    """Write the bundle (RAS, 2 mm, windows of 16 voxels, three labels) into `folder` and return it."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    network = _NETWORK | {"in_channels": channels}
    inference = INFERENCE | {"network_def": INFERENCE["network_def"] | network}
    for name, content in (("inference", inference), ("metadata", METADATA)):
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content))
    torch.manual_seed(seed)
    save_file(UNet(**network).state_dict(), folder / "models" / "model.safetensors")
    return folder
