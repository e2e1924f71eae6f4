"""The selective scan in vectorised PyTorch: about 2*sqrt(L) sequential steps, on any device and in any real dtype.

A sequence is cut into S chunks of T steps. All chunks walk their T steps side by side from a zero state; a second,
short loop carries the state from chunk to chunk; the carried part is then added to the outputs. All exponents are sums
of dt * A over at most a chunk, so negative A never overflows. The backward pass walks the adjoint the same way and
recomputes the states from the saved chunk states, a sub-chunk at a time: nothing of size B*D*L*N is ever stored.

Letters: B batch, D channels, L steps, N states, G groups of B and C, P channels of a group, S chunks, T steps of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from .chunks import chunk_length


class Gradients(NamedTuple):
    """What the walk back over a recurrence yields, in the accumulation dtype."""

    y: Tensor  # (B, D, L), the output without D and z, recomputed
    u: Tensor  # (B, D, L)
    dt: Tensor  # (B, D, L)
    A: Tensor  # (D, N)
    B: Tensor  # (B, G, N, L)
    C: Tensor  # (B, G, N, L)


class Chunked:
    """The inputs of one call in the accumulation dtype, padded and cut into chunks of `steps` steps.

    Per-channel tensors are (B, G, P, S) at one step, states (B, G, P, S, N), B and C (B, G, 1, S, N). Padded steps have
    dt = 0: they keep the state and add nothing.
    """

    def __init__(self, u, delta, A, B, C, delta_bias, delta_softplus, steps):
        self.batch, self.channels, self.length = u.shape
        self.groups, self.states = B.shape[1], A.shape[1]
        self.per_group = self.channels // self.groups
        self.steps, self.count = steps, -(-self.length // steps)
        self.dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        pre = delta.to(self.dtype)
        if delta_bias is not None:
            pre = pre + delta_bias.to(self.dtype)[:, None]
        self.pre_softplus = pre
        self.A = A.to(self.dtype).view(self.groups, self.per_group, 1, self.states)
        self.u = self.cut(u)
        self.dt = self.cut(softplus(pre) if delta_softplus else pre)
        self.B, self.C = self.cut_states(B), self.cut_states(C)

    def cut(self, x: Tensor) -> Tensor:
        """(B, D, L) -> (T, B, G, P, S)."""
        x = pad(x.to(self.dtype), (0, self.steps * self.count - self.length))
        return x.view(self.batch, self.groups, self.per_group, self.count, self.steps).permute(4, 0, 1, 2, 3)

    def cut_states(self, x: Tensor) -> Tensor:
        """(B, G, N, L) -> (T, B, G, 1, S, N)."""
        x = pad(x.to(self.dtype), (0, self.steps * self.count - self.length))
        return x.view(self.batch, self.groups, 1, self.states, self.count, self.steps).permute(5, 0, 1, 2, 4, 3)

    def join(self, steps: list[Tensor] | Tensor) -> Tensor:
        """T tensors (B, G, P, S), or one (T, B, G, P, S) -> (B, D, L), the inverse of `cut`."""
        whole = steps.movedim(0, -1) if isinstance(steps, Tensor) else torch.stack(steps, dim=-1)
        return whole.reshape(self.batch, self.channels, self.count * self.steps)[..., : self.length]

    def join_states(self, steps: list[Tensor]) -> Tensor:
        """T tensors (B, G, S, N) -> (B, G, N, L), the inverse of `cut_states`."""
        stacked = torch.stack(steps, dim=-1).permute(0, 1, 3, 2, 4)
        stacked = stacked.reshape(self.batch, self.groups, self.states, self.count * self.steps)
        return stacked[..., : self.length]

    def decay(self, dt: Tensor) -> Tensor:
        return torch.exp(dt[..., None] * self.A)

    def drive(self, step: int) -> Tensor:
        return (self.dt[step] * self.u[step])[..., None] * self.B[step]

    def advance(self, state: Tensor, step: int) -> Tensor:
        return self.decay(self.dt[step]) * state + self.drive(step)

    def zero_state(self) -> Tensor:
        return self.u.new_zeros((self.batch, self.groups, self.per_group, self.count, self.states))

    def carry(self, ends: Tensor, first: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """Runs value <- decay(chunk) * value + end(chunk) over the chunks.

        Returns the values entering each chunk (like a state of all chunks) and the value that leaves the last one.
        """
        decay = self.decay(self.dt.sum(0))
        value, entering = first, [first] * self.count
        order = range(self.count - 1, -1, -1) if reverse else range(self.count)
        for chunk in order:
            entering[chunk] = value
            value = decay[:, :, :, chunk] * value + ends[:, :, :, chunk]
        return torch.stack(entering, dim=3), value


def scan(c: Chunked) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence itself: y (B, D, L) without D and z, chunk-start states (B, D, S, N), last state (B, D, N)."""
    state, local = c.zero_state(), []
    for step in range(c.steps):
        state = c.advance(state, step)
        local.append((c.C[step] * state).sum(-1))
    starts, last = c.carry(state, torch.zeros_like(state[:, :, :, 0]))
    dt_sum, outputs = torch.zeros_like(c.dt[0]), []
    for step in range(c.steps):
        dt_sum = dt_sum + c.dt[step]
        outputs.append(local[step] + (c.C[step] * c.decay(dt_sum) * starts).sum(-1))
    shape = (c.batch, c.channels)
    return c.join(outputs), starts.reshape(*shape, c.count, c.states), last.reshape(*shape, c.states)


def scan_adjoint(c: Chunked, y_grad: Tensor, chunk_states: Tensor, grad_last_state: Tensor | None) -> Gradients:
    """Walks the recurrence back, given the gradient of y (B, D, L) and what `scan` returned as chunk-start states."""
    gc = c.cut(y_grad)
    starts = chunk_states.to(c.dtype).view(c.zero_state().shape)

    # What each chunk passes to the one before it, then what enters each chunk from the one after it.
    message = c.zero_state()
    for step in range(c.steps - 1, -1, -1):
        message = c.decay(c.dt[step]) * (c.C[step] * gc[step][..., None] + message)
    first = torch.zeros_like(message[:, :, :, 0])
    if grad_last_state is not None:
        first = grad_last_state.to(c.dtype).view(first.shape)
    message, _ = c.carry(message, first, reverse=True)

    # States at the start of each sub-chunk: with about sqrt(T) of them, recomputing costs one more pass and
    # keeps 2 * sqrt(T) states of all chunks alive instead of T.
    stride = chunk_length(c.steps)
    state, checkpoints = starts, []
    for step in range(c.steps):
        if step % stride == 0:
            checkpoints.append(state)
        state = c.advance(state, step)

    none = [None] * c.steps
    y, du, ddt, dB, dC = none.copy(), none.copy(), none.copy(), none.copy(), none.copy()
    dA = torch.zeros_like(starts)
    for start in reversed(range(0, c.steps, stride)):
        states = [checkpoints.pop()]
        for step in range(start, min(start + stride, c.steps)):
            states.append(c.advance(states[-1], step))
        for step in reversed(range(start, min(start + stride, c.steps))):
            state = states.pop()
            adjoint = c.C[step] * gc[step][..., None] + message
            message = c.decay(c.dt[step]) * adjoint
            carried = message * states[-1]  # adjoint * decay * previous state
            from_input = (adjoint * c.B[step]).sum(-1)
            y[step] = (c.C[step] * state).sum(-1)
            dC[step] = (gc[step][..., None] * state).sum(2)
            dB[step] = (adjoint * (c.dt[step] * c.u[step])[..., None]).sum(2)
            du[step] = c.dt[step] * from_input
            ddt[step] = c.u[step] * from_input + (carried * c.A).sum(-1)
            dA = dA + carried * c.dt[step][..., None]
    dA = dA.sum((0, 3)).reshape(c.channels, c.states)
    return Gradients(c.join(y), c.join(du), c.join(ddt), dA, c.join_states(dB), c.join_states(dC))


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The output (B, D, L) in u's dtype: adds D * u to y and multiplies by silu(z)."""
    if D is not None:
        y = y + u.to(y.dtype) * D.to(y.dtype)[:, None]
    if z is not None:
        y = y * silu(z.to(y.dtype))
    return y.to(u.dtype).contiguous()


def before_gate(grad_out: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of y + D * u in the accumulation dtype, given that of the output."""
    grad = grad_out.to(dtype)
    return grad if z is None else grad * silu(z.to(dtype))


def input_gradients(
    c: Chunked, found: Gradients, y_grad, grad_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus
):
    """From the gradients of the recurrence to those of all inputs, in their dtypes; empty for absent inputs."""
    du, ddelta, wide = found.u, found.dt, u.to(c.dtype)
    if D is not None:
        du = du + y_grad * D.to(c.dtype)[:, None]
    if delta_softplus:
        ddelta = ddelta * torch.sigmoid(c.pre_softplus)
    dz = u.new_empty((0,))
    if z is not None:
        gate = z.to(c.dtype)
        sigmoid = torch.sigmoid(gate)
        out = found.y if D is None else found.y + wide * D.to(c.dtype)[:, None]
        dz = (grad_out.to(c.dtype) * out * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype)
    return (
        du.to(u.dtype).contiguous(),
        ddelta.to(delta.dtype).contiguous(),
        found.A.to(A.dtype),
        found.B.to(B.dtype).contiguous(),
        found.C.to(C.dtype).contiguous(),
        A.new_empty((0,)) if D is None else (y_grad * wide).sum((0, 2)).to(D.dtype),
        dz,
        A.new_empty((0,)) if delta_bias is None else ddelta.sum((0, 2)).to(delta_bias.dtype),
    )


def selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """out in u's dtype; last state (B, D, N) and chunk-start states (B, D, S, N) in the accumulation dtype."""
    c = Chunked(u, delta, A, B, C, delta_bias, delta_softplus, chunk_length(u.shape[2]))
    y, chunk_states, last_state = scan(c)
    return skip_and_gate(y, u, D, z), last_state, chunk_states


def selective_scan_backward(
    grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus
):
    """Gradients of all inputs in their dtypes; absent optional inputs give empty tensors."""
    c = Chunked(u, delta, A, B, C, delta_bias, delta_softplus, chunk_length(u.shape[2]))
    y_grad = before_gate(grad_out, z, c.dtype)
    found = scan_adjoint(c, y_grad, chunk_states, grad_last_state)
    return input_gradients(c, found, y_grad, grad_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
