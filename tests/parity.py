"""Deterministic weights, inputs and summaries for parity checks against official implementations.

A golden file records what an official implementation computed on CPU in float32 when every tensor of
its state dict was filled by `fill_state` and its input by `fill_input`. Nothing but NumPy's frozen
legacy generator decides the numbers, so any machine rebuilds the same weights from names and shapes.

Golden file (JSON)
    name        model name in this golden set
    source      {"repo", "commit", "entry", "kwargs"}: what was run
    params      number of trainable parameters
    state       [[key, shape], ...] in the official naming and order
    input       shape of the float32 input (several inputs: list of shapes)
    outputs     {tap: {"shape", "mean", "std", "values"}}: `values` are `sample(tensor)`
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

SAMPLES = 256


def _normal(name: str, shape) -> np.ndarray:
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    return rng.standard_normal(tuple(shape)).astype(np.float32)


def fill_tensor(key: str, shape) -> np.ndarray:
    """float32 values for the parameter or buffer `key`; scaled so that deep nets neither die nor blow up."""
    shape = tuple(shape)
    z = _normal(key, shape)
    leaf = key.rsplit(".", 1)[-1].lower()
    low = key.lower()
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.float32)
    if leaf == "running_mean":
        return 0.1 * z
    if leaf == "running_var":
        return np.exp(0.1 * z).astype(np.float32)
    if leaf.startswith(("a_log", "a_b_log", "a_c_log", "a_s_log")):
        base = np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) if len(shape) > 1 else np.zeros(shape, np.float32)
        return (base + 0.1 * z).astype(np.float32)
    if ("dt_proj" in low and leaf.endswith("bias")) or leaf == "dt_bias":
        return (0.5 * z - 3.0).astype(np.float32)
    if leaf in ("d", "ds", "d_b", "d_c", "d_s"):
        return (1.0 + 0.1 * z).astype(np.float32)
    if len(shape) <= 1:
        if leaf.endswith("weight") or leaf in ("gamma", "scale", "skip_scale"):
            return (1.0 + 0.1 * z).astype(np.float32)
        return (0.05 * z).astype(np.float32)
    if "pos_embed" in low or "cls_token" in low:
        return (0.2 * z).astype(np.float32)
    stacked = any(s in low for s in ("x_proj", "dt_proj")) and not low.endswith(".weight")
    fan_in = shape[-1] if stacked else int(np.prod(shape[1:]))
    gain = 0.2 if ".cpe" in low else 1.0  # conditional positional encodings are added twice a block
    return (gain * z / np.sqrt(max(fan_in, 1))).astype(np.float32)


def fill_state(shapes) -> dict[str, np.ndarray]:
    """`shapes`: iterable of (key, shape) -> {key: float32 array} (integer buffers come back as zeros)."""
    return {key: fill_tensor(key, shape) for key, shape in shapes}


def fill_input(shape, index: int = 0) -> np.ndarray:
    """float32 standard-normal input of `shape`; `index` tells several inputs apart."""
    return _normal(f"input/{index}", shape)


def sample(array, n: int = SAMPLES) -> list[float]:
    """`n` values at positions spread evenly (by a fixed stride pattern) over the flattened array."""
    flat = np.asarray(array, dtype=np.float64).reshape(-1)
    idx = np.unique(np.linspace(0, flat.size - 1, min(n, flat.size)).round().astype(np.int64))
    return [float(v) for v in flat[idx]]


def summarise(array) -> dict:
    a = np.asarray(array, dtype=np.float64)
    return {"shape": list(a.shape), "mean": float(a.mean()), "std": float(a.std()), "values": sample(a)}


def load(path) -> dict:
    return json.loads(Path(path).read_text())


def save(path, golden: dict) -> None:
    Path(path).write_text(json.dumps(golden, separators=(",", ":")) + "\n")


def relative_error(got, want: dict) -> float:
    """‖got − want‖ / ‖want‖ over the sampled values; raises on a shape mismatch or a non-finite value."""
    got = np.asarray(got, dtype=np.float64)
    if list(got.shape) != list(want["shape"]):
        raise ValueError(f"shape {list(got.shape)} instead of {want['shape']}")
    g, w = np.asarray(sample(got)), np.asarray(want["values"])
    if not np.isfinite(g).all():
        raise ValueError("non-finite values")
    return float(np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-12))
