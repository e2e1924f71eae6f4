"""The scan along routes in vectorised PyTorch: sequences gathered by the table, then the portable selective scan.

Results come back by gathering with the inverse of the table rather than by adding, so that they are deterministic on
every device.

Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt, S chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..selective_scan import portable as scan


class Sequences:
    """Positions and steps of the routes, and the inputs of one call as sequences in the accumulation dtype."""

    def __init__(self, x, dt_b_c, dt_weight, A, order, D, delta_bias):
        self.separate = x.ndim == 4
        self.positions = x.shape[1]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        routes, length = order.shape
        self.route = torch.arange(routes, device=order.device)[:, None]
        # A position more holds the zeros of steps of padding, and a step more those of positions never visited.
        self.position = torch.where(order < 0, self.positions, order).long()
        steps = torch.arange(length, device=order.device).expand(routes, length)
        never = steps.new_full((routes, self.positions + 1), length)
        self.step = never.scatter(1, self.position, steps)[:, : self.positions]

        self.states = A.shape[2]
        self.x = self.walk(x, self.separate)
        self.low, self.B, self.C = self.walk(dt_b_c, True).split((dt_weight.shape[2], self.states, self.states), dim=2)
        self.weight = dt_weight.to(self.dtype)
        flat = [None if t is None else t.to(self.dtype).flatten() for t in (D, delta_bias)]
        delta = (self.weight @ self.low).flatten(1, 2)
        # u, delta, A, B, C, D, z, delta_bias of the selective scan.
        self.arguments = (self.x.flatten(1, 2), delta, A.flatten(0, 1), self.B, self.C, flat[0], None, flat[1])

    def walk(self, x: Tensor, separate: bool) -> Tensor:
        """(B, P, K, D) if separate, else (B, P, D) -> (B, K, D, L)."""
        x = x.to(self.dtype)
        x = pad(x, (0, 0, 0, 0, 0, 1)) if separate else pad(x, (0, 0, 0, 1))
        return (x[:, self.position, self.route] if separate else x[:, self.position]).mT

    def unwalk(self, y: Tensor, separate: bool) -> Tensor:
        """The adjoint of `walk`."""
        y = pad(y, (0, 1))[:, self.route, :, self.step].permute(2, 1, 0, 3)
        return y if separate else y.sum(2)


def cross_selective_scan_forward(x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus):
    """y like x; chunk-start states (B, K, D, S, N) in the accumulation dtype."""
    c = Sequences(x, dt_b_c, dt_weight, A, order, D, delta_bias)
    y, _, chunk_states = scan.selective_scan_forward(*c.arguments, delta_softplus)
    y = c.unwalk(y.view(c.x.shape), c.separate)
    return y.to(x.dtype).contiguous(), chunk_states.unflatten(1, A.shape[:2])


def cross_selective_scan_backward(grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states, delta_softplus):
    """Gradients of all inputs but the table in their dtypes; absent optional inputs give empty tensors."""
    c = Sequences(x, dt_b_c, dt_weight, A, order, D, delta_bias)
    grad = c.walk(grad_y, c.separate).flatten(1, 2)
    du, ddelta, dA, dB, dC, dD, _, dbias = scan.selective_scan_backward(
        grad, None, *c.arguments, chunk_states.flatten(1, 2), delta_softplus
    )
    ddelta = ddelta.view(c.x.shape)
    drows = torch.cat((c.weight.mT @ ddelta, dB, dC), dim=2)
    return (
        c.unwalk(du.view(c.x.shape), c.separate).to(x.dtype).contiguous(),
        c.unwalk(drows, True).to(dt_b_c.dtype).contiguous(),
        torch.einsum("bkdl,bkrl->kdr", ddelta, c.low).to(dt_weight.dtype),
        dA.view(A.shape),
        A.new_empty((0,)) if D is None else dD.view(D.shape),
        A.new_empty((0,)) if delta_bias is None else dbias.view(delta_bias.shape),
    )
