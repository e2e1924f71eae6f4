"""Files of published weights: fetched, kept with their hashes, converted, verified."""

from .store import Kept, WeightsError, add, by_hand, fetch, get, kept_files, store_folder

__all__ = ["Kept", "WeightsError", "add", "by_hand", "fetch", "get", "kept_files", "store_folder"]
