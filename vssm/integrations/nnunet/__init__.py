"""U-Mamba and SegMamba as trainers of nnU-Net (nnunetv2 2.6 or later): `pip install "vssm[nnunet]"`, then

    python -m vssm.integrations.nnunet install
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerUMambaBot

nnU-Net looks for trainers in a folder of its own package. `install` puts one file there that leads here, `uninstall`
removes it. Where that folder must stay as it is, nnunetv2 2.8 or later also finds them through a variable:

    export nnUNet_extTrainer=$(python -m vssm.integrations.nnunet folder)
"""

from importlib import import_module

__all__ = ["nnUNetTrainerSegMamba", "nnUNetTrainerUMambaBot", "nnUNetTrainerUMambaEnc"]


def __getattr__(name: str) -> object:
    # Not imported before they are asked for: the command must be able to say that nnunetv2 is missing.
    if name in __all__:
        return getattr(import_module(".trainers", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
