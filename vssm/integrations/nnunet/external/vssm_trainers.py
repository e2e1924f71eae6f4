"""Leads nnU-Net to the trainers of vssm; see vssm.integrations.nnunet."""

_TRAINERS = ("nnUNetTrainerSegMamba", "nnUNetTrainerUMambaBot", "nnUNetTrainerUMambaEnc")


def __getattr__(name):
    # nnU-Net imports every module of the folder and asks it for the class; vssm is imported for its own trainers only.
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vssm.integrations import nnunet

    return getattr(nnunet, name)
