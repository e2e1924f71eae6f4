"""CT and MR volumes: reading them safely, segmenting them with a MONAI bundle, writing the result on their own grid."""

from .bundle import Bundle, default_bundle_path, find_bundle, load_bundle
from .errors import VolumeError
from .predicting import foreground_ml, mismatches, predict_volume
from .reading import Volume, read_volume
from .segmenting import CaseResult, Segment, Segmentation, Settings, probabilities_path, segment_file, segment_folder
from .writing import check_output, write_labels

__all__ = [
    "Bundle",
    "CaseResult",
    "Segment",
    "Segmentation",
    "Settings",
    "Volume",
    "VolumeError",
    "check_output",
    "default_bundle_path",
    "find_bundle",
    "foreground_ml",
    "load_bundle",
    "mismatches",
    "predict_volume",
    "probabilities_path",
    "read_volume",
    "segment_file",
    "segment_folder",
    "write_labels",
]
