"""The selective scan in vectorised PyTorch: about 2*sqrt(L) sequential steps, on any device and in any real dtype.

A sequence is cut into S chunks of T steps. All chunks walk their T steps side by side from a zero state; a second,
short loop carries the state from chunk to chunk; the chunks then walk again, from the states that enter them, and give
the outputs. All exponents are dt * A summed over at most a chunk, so negative A never overflows. The backward pass
carries the adjoint the same way and recomputes the states from the saved chunk states, a sub-chunk at a time: nothing
of size B*D*L*N is ever stored.

Channels are innermost in memory and states outermost: whatever a step does runs over P contiguous elements.

Letters: B batch, D channels, L steps, N states, G groups of B and C, P channels of a group, S chunks, T steps of one.
"""

from __future__ import annotations

import math
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

    Per-channel tensors are (B, S, G, P) at one step, states (N, B, S, G, P), B and C (N, B, S, G, 1). Padded steps have
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
        self.A = A.to(self.dtype).t().reshape(self.states, 1, 1, self.groups, self.per_group)
        # For powers of two, which PyTorch's CPU kernels take several times faster than those of e.
        self.A_binary = self.A * math.log2(math.e)
        self.u = self.cut(u)
        self.dt = self.cut(softplus(pre) if delta_softplus else pre)
        self.dt_u = self.dt * self.u
        self.B, self.C = self.cut_states(B), self.cut_states(C)

    def padded(self, x: Tensor) -> Tensor:
        """(..., L) -> (..., S * T) in the accumulation dtype."""
        missing = self.steps * self.count - self.length
        return pad(x.to(self.dtype), (0, missing)) if missing else x.to(self.dtype)

    def cut(self, x: Tensor) -> Tensor:
        """(B, D, L) -> (T, B, S, G, P)."""
        # In memory T stays next to S, which leaves a plain transposition to do.
        x = self.padded(x).mT.contiguous()
        return x.view(self.batch, self.count, self.steps, self.groups, self.per_group).movedim(2, 0)

    def cut_states(self, x: Tensor) -> Tensor:
        """(B, G, N, L) -> (T, N, B, S, G, 1)."""
        x = self.padded(x).reshape(self.batch, self.groups, self.states, self.count, self.steps, 1)
        return x.permute(4, 2, 0, 3, 1, 5).contiguous()

    def stack(self, steps: list[Tensor]) -> Tensor:
        """T tensors (B, S, G, P) -> (T, B, S, G, P), in memory as `cut` gives it."""
        return torch.stack(steps, dim=2).movedim(2, 0)

    def join(self, x: Tensor) -> Tensor:
        """(T, B, S, G, P) -> (B, D, L), the inverse of `cut`."""
        x = x.movedim(0, 2).reshape(self.batch, self.count * self.steps, self.channels)
        return x[:, : self.length].mT.contiguous()

    def join_states(self, steps: list[Tensor]) -> Tensor:
        """T tensors (N, B, S, G) -> (B, G, N, L), the inverse of `cut_states`."""
        x = torch.stack(steps, dim=-1).permute(1, 3, 0, 2, 4)
        return x.reshape(self.batch, self.groups, self.states, self.count * self.steps)[..., : self.length]

    def decay(self, dt: Tensor) -> Tensor:
        return torch.exp2(dt * self.A_binary)

    def advance(self, state: Tensor, step: int, decay: Tensor | None = None) -> Tensor:
        """The state after a step; `decay` is that of the step where it is known already."""
        decay = self.decay(self.dt[step]) if decay is None else decay
        return torch.addcmul(decay * state, self.B[step], self.dt_u[step])

    def zero_state(self) -> Tensor:
        return self.u.new_zeros((self.states, self.batch, self.count, self.groups, self.per_group))

    def carry(self, ends: Tensor, first: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """Runs value <- decay(chunk) * value + end(chunk) over the chunks.

        Returns the values entering each chunk (like a state of all chunks) and the value that leaves the last one.
        """
        decay = self.decay(self.dt.sum(0))
        value, entering = first, [first] * self.count
        order = range(self.count - 1, -1, -1) if reverse else range(self.count)
        for chunk in order:
            entering[chunk] = value
            value = torch.addcmul(ends[:, :, chunk], decay[:, :, chunk], value)
        return torch.stack(entering, dim=2), value

    def from_chunk_states(self, x: Tensor) -> Tensor:
        """(B, D, S, N) -> (N, B, S, G, P)."""
        x = x.to(self.dtype).permute(3, 0, 2, 1)
        return x.reshape(self.states, self.batch, self.count, self.groups, self.per_group).contiguous()

    def to_chunk_states(self, x: Tensor) -> Tensor:
        """The inverse of `from_chunk_states`."""
        return x.flatten(3).permute(1, 3, 2, 0).contiguous()


def scan(c: Chunked) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence itself: y (B, D, L) without D and z, chunk-start states (B, D, S, N), last state (B, D, N)."""
    state = c.zero_state()
    for step in range(c.steps):
        state = c.advance(state, step)
    starts, last = c.carry(state, torch.zeros_like(state[:, :, 0]))
    state, outputs = starts, []
    for step in range(c.steps):
        state = c.advance(state, step)
        outputs.append((c.C[step] * state).sum(0))
    return c.join(c.stack(outputs)), c.to_chunk_states(starts), last.flatten(2).permute(1, 2, 0).contiguous()


def scan_adjoint(c: Chunked, y_grad: Tensor, chunk_states: Tensor, grad_last_state: Tensor | None) -> Gradients:
    """Walks the recurrence back, given the gradient of y (B, D, L) and what `scan` returned as chunk-start states."""
    gc = c.cut(y_grad)

    # One walk forward finds two things. What each chunk passes to the one before it: every gradient of the chunk, times
    # the decay from the start of the chunk. And the states at the start of each sub-chunk: with about sqrt(T) of them,
    # recomputing costs one more pass and keeps a few times sqrt(T) states of all chunks alive instead of T.
    stride = chunk_length(c.steps)
    state, checkpoints = c.from_chunk_states(chunk_states), []
    message, since_start = c.zero_state(), torch.ones_like(state)
    for step in range(c.steps):
        if step % stride == 0:
            checkpoints.append(state)
        decay = c.decay(c.dt[step])
        since_start = since_start * decay
        message = torch.addcmul(message, since_start, c.C[step] * gc[step])
        state = c.advance(state, step, decay)

    # What enters each chunk from the one after it.
    first = torch.zeros_like(message[:, :, 0])
    if grad_last_state is not None:
        first = grad_last_state.to(c.dtype).permute(2, 0, 1).reshape(first.shape)
    message, _ = c.carry(message, first, reverse=True)

    none = [None] * c.steps
    y, from_input, from_decay, dB, dC = none.copy(), none.copy(), none.copy(), none.copy(), none.copy()
    dA = c.zero_state()
    for start in reversed(range(0, c.steps, stride)):
        states, decays = [checkpoints.pop()], []
        for step in range(start, min(start + stride, c.steps)):
            decays.append(c.decay(c.dt[step]))
            states.append(c.advance(states[-1], step, decays[-1]))
        for step in reversed(range(start, min(start + stride, c.steps))):
            state = states.pop()
            adjoint = torch.addcmul(message, c.C[step], gc[step])
            message = decays.pop() * adjoint
            carried = message * states[-1]  # adjoint * decay * previous state
            y[step] = (c.C[step] * state).sum(0)
            from_input[step] = (adjoint * c.B[step]).sum(0)
            from_decay[step] = (carried * c.A).sum(0)
            dB[step] = (adjoint * c.dt_u[step]).sum(-1)
            dC[step] = (state * gc[step]).sum(-1)
            dA = torch.addcmul(dA, carried, c.dt[step])
    return gather(c, y, from_input, from_decay, dA, dB, dC)


def gather(c: Chunked, y, from_input, from_decay, dA: Tensor, dB, dC) -> Gradients:
    """Gradients of the call from those of its steps: of dt * u, of dt by way of the decay, and of A in every chunk."""
    from_input = c.stack(from_input)
    ddt = torch.addcmul(c.stack(from_decay), c.u, from_input)
    return Gradients(
        y=c.join(c.stack(y)),
        u=c.join(c.dt * from_input),
        dt=c.join(ddt),
        A=dA.sum((1, 2)).flatten(1).t().contiguous(),
        B=c.join_states(dB),
        C=c.join_states(dC),
    )


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
