"""What the tests of VM-UNet and of MHS-VM share: the taps of their golden files."""

from __future__ import annotations

import parity
import torch
from recording import recording

from vssm.networks.vmunet import VSSUNet


def golden_outputs(network: VSSUNet, golden: dict, parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The taps of a golden file, for its input; `parts`: taps that only this network has. Maps are channels last."""
    stages = network.encoder.stages
    parts = {"patch_embed": network.encoder.stem, "final_up": network.upsample} | parts
    parts |= {f"stage{i}": stage.blocks for i, stage in enumerate(stages)}
    parts |= {f"up{i}": stage for i, stage in enumerate(network.decoder)}
    with recording(parts) as outputs, torch.inference_mode():
        logits = network.eval()(torch.from_numpy(parity.fill_input(golden["input"])))
    outputs["patch_embed"] = outputs["patch_embed"].movedim(1, -1)
    binary = golden["source"]["kwargs"]["num_classes"] == 1
    # The official network applies the sigmoid itself if it has one class.
    return outputs | {"logits": logits, "out": logits.sigmoid() if binary else logits}
