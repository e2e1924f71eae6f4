"""Training segmentation networks on volumes and pictures: data, plan, loop, export. Needs the `medical` extra."""

from .fitting import Moment, Outcome, train
from .options import TrainingOptions
from .setting_up import plan_only

__all__ = ["Moment", "Outcome", "TrainingOptions", "plan_only", "train"]
