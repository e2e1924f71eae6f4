"""Reading JSON files that people write."""

import json
from pathlib import Path
from typing import Any

from .errors import VolumeError


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: what to do, or why it is needed, if the file cannot be read.

    Raises:
        VolumeError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise VolumeError(f"{path}: is not JSON ({error}); correct it") from None
    if not isinstance(content, dict):
        raise VolumeError(f"{path}: must hold a JSON object, got {type(content).__name__}; correct it")
    return content
