"""Shapes without storage: models are counted and sharded on the meta device before their weights exist."""

import pytest
import torch

from vssm.ops import (
    causal_conv1d,
    cross_selective_scan,
    local_bidirectional_scan,
    nc_ssd,
    selective_scan,
    ssd,
)


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


SEQUENCE = (meta(2, 4, 9), meta(2, 4, 9), meta(4, 3), meta(2, 3, 9), meta(2, 3, 9))
HEADS = (meta(2, 9, 4, 5), meta(2, 9, 4), meta(4), meta(2, 9, 1, 3), meta(2, 9, 1, 3))
MAP = (meta(2, 9, 4), meta(2, 9, 2, 7), meta(2, 4, 1), meta(2, 4, 3), meta(2, 9, dtype=torch.int32))


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (causal_conv1d, (meta(2, 4, 9), meta(4, 3))),
        (selective_scan, SEQUENCE),
        (lambda *x: local_bidirectional_scan(*x, window=4), SEQUENCE),
        (cross_selective_scan, MAP),
        (lambda *x: ssd(*x, chunk_size=4), HEADS),
        (nc_ssd, HEADS),
    ],
)
def test_every_op_gives_shapes_on_the_meta_device(op, arguments):
    out = op(*arguments)
    assert out.is_meta and out.shape == arguments[0].shape and out.dtype == arguments[0].dtype
