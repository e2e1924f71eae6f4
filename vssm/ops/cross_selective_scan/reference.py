"""The definition of the scan along routes: gather by the table, the sequential scan, scatter-add; any real dtype.

Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..selective_scan.reference import selective_scan_reference


def cross_selective_scan_reference(
    x: Tensor,
    dt_b_c: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    order: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Route by route; the sum over routes of a shared x is taken before rounding to x's dtype."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank, states = dt_weight.shape[2], A.shape[2]
    separate = x.ndim == 4
    outputs = []
    for k, table in enumerate(order.long()):
        steps, inside = table.clamp(min=0), (table >= 0)[:, None]
        u = (x[:, :, k] if separate else x).to(accumulate)
        sequence = torch.where(inside, u[:, steps], 0)
        dt, b, c = torch.where(inside, dt_b_c[:, steps, k].to(accumulate), 0).split((rank, states, states), -1)
        y, _ = selective_scan_reference(
            sequence.mT,
            (dt @ dt_weight[k].to(accumulate).mT).mT,
            A[k],
            b.mT[:, None],
            c.mT[:, None],
            None if D is None else D[k],
            None,
            None if delta_bias is None else delta_bias[k],
            delta_softplus,
        )
        outputs.append(torch.zeros_like(u).index_add(1, steps, torch.where(inside, y.mT, 0)))
    y = torch.stack(outputs, dim=2) if separate else torch.stack(outputs).sum(0)
    return y.to(x.dtype)
