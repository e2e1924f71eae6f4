"""The trainers: vssm's networks in nnU-Net's training, with any of its devices.

Plans, patches, augmentation, optimiser, schedule, prediction and post-processing are nnU-Net's. What a trainer changes
besides the network stands in its docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from ...layers.unet import check_size
from ...networks import SegMamba, UMambaBot, UMambaEnc
from .registration import require_nnunet

require_nnunet()

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402

__all__ = ["nnUNetTrainerSegMamba", "nnUNetTrainerUMambaBot", "nnUNetTrainerUMambaEnc"]


class _Trainer(nnUNetTrainer):
    """Builds the network from one configuration of the plans, as nnU-Net 2.7 and later hand it over."""

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """nnU-Net calls it, for training and for prediction."""
        plans = configuration_manager.configuration
        return cls._network(plans, num_input_channels, num_output_channels, enable_deep_supervision)


class _EarlyTrainer(nnUNetTrainer):
    """The same for nnU-Net 2.6, which hands over the architecture's arguments alone.

    The patch size therefore travels among them, also in the plans that are saved with the weights for prediction.
    """

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")) -> None:  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        architecture = self.configuration_manager.configuration["architecture"]
        architecture["arch_kwargs"]["patch_size"] = self.configuration_manager.patch_size
        self.plans_manager.plans["configurations"][configuration]["architecture"] = architecture

    @classmethod
    def build_network_architecture(
        cls,
        architecture_class_name,
        arch_init_kwargs,
        arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        enable_deep_supervision=True,
    ) -> nn.Module:
        """nnU-Net calls it, for training and for prediction."""
        plans = {"architecture": {"arch_kwargs": arch_init_kwargs}, "patch_size": arch_init_kwargs["patch_size"]}
        return cls._network(plans, num_input_channels, num_output_channels, enable_deep_supervision)


_signature = inspect.signature(nnUNetTrainer.build_network_architecture)
_Base = _Trainer if "plans_manager" in _signature.parameters else _EarlyTrainer


class _UMambaTrainer(_Base):
    _network_class: ClassVar[type]

    @classmethod
    def _network(cls, plans: Mapping, in_channels: int, out_channels: int, deep_supervision: bool) -> nn.Module:
        # Always with the heads of every resolution, since nnU-Net loads the trained weights strictly for prediction.
        network = cls._network_class.from_plans(plans, in_channels, out_channels, deep_supervision=True)
        network.deep_supervision = deep_supervision
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch between logits at every resolution and at the highest only."""
        network = self.network.module if self.is_ddp else self.network
        # What torch.compile returns keeps the network there.
        getattr(network, "_orig_mod", network).deep_supervision = enabled


class nnUNetTrainerUMambaBot(_UMambaTrainer):
    """U-Mamba (arXiv 2401.04722) with Mamba at the bottleneck; all settings are nnU-Net's, as in the official trainer.

    The Mamba layer computes in float32 also where nnU-Net trains in half precision.
    """

    _network_class = UMambaBot


class nnUNetTrainerUMambaEnc(_UMambaTrainer):
    """U-Mamba (arXiv 2401.04722) with Mamba throughout the encoder; all settings are nnU-Net's, as officially.

    The Mamba layers compute in float32 also where nnU-Net trains in half precision. The weights depend on the patch
    size of the plans.
    """

    _network_class = UMambaEnc


class nnUNetTrainerSegMamba(_Base):
    """SegMamba (arXiv 2401.13560), published sizes: 48 to 384 channels and 768 at the bottleneck whatever the plans.

    As in the official training the loss is cross-entropy alone (binary for regions) and there is no deep supervision.
    Different from it, since they are nnU-Net's: the learning rate falls once an epoch, not at every step, and patches
    and spacing come from the plans; officially 128 voxels per axis and 1 mm.

    Raises:
        ValueError: when the network is built, if the patch size of the plans is not divisible by 16; with the size to
            set instead.
    """

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")) -> None:  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False

    @classmethod
    def _network(cls, plans: Mapping, in_channels: int, out_channels: int, deep_supervision: bool) -> nn.Module:
        patch_size = plans["patch_size"]
        network = SegMamba(in_channels, out_channels, spatial_dims=len(patch_size))
        try:
            check_size("SegMamba", patch_size, [2 ** len(network.stages)] * len(patch_size))
        except ValueError as error:
            raise ValueError(f"patch_size in nnU-Net's plans: {error}, by editing the plans file") from None
        return network

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        loss.weight_dice = 0
        return loss

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch: the network has one output."""
