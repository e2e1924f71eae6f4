"""Mamba-2's scan as matrix products (arXiv 2405.21060, section 6), for any device and real dtype.

A sequence is cut into S chunks of T steps. Within a chunk y[i] = sum over j <= i of (C[i].B[j]) M[j, i] dt[j] x[j],
with M[j, i] the decay from step j to step i; the states that chunks begin with come from a short loop over chunks and
add their decayed part. Decays are exponentials of plain sums of dt * A, none of which is taken as the difference of two
longer ones: for negative A they do not overflow, and steps after a huge one keep their short memory exactly. The
backward pass recomputes everything from the inputs. M and its kin, T numbers per head and step, are made for a few
chunks at a time.

Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, R heads of a group, N states, S chunks,
T steps of one, K = B*S chunks of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

# Numbers in the decays of the chunks worked on at a time: what caches and allocators of the device like.
_SLAB = {"cpu": 2**20}
_SLAB_ELSEWHERE = 2**26


def chunk_sizes(length: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and steps per chunk, at most `chunk_size` and as even as possible."""
    count = -(-length // chunk_size)
    return count, -(-length // count)


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """The step sizes of the recurrence (B, L, H) in the dtype of dt."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    return (softplus(dt) if dt_softplus else dt).clamp(dt_min, dt_max)


def step_size_gradients(
    grad: Tensor, dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float
) -> Tensor:
    """The gradient of dt, given that of `step_sizes`, in its dtype; summed over batch and steps that of dt_bias."""
    dt = dt.to(grad.dtype) if dt_bias is None else dt.to(grad.dtype) + dt_bias.to(grad.dtype)
    sizes = softplus(dt) if dt_softplus else dt
    grad = torch.where((sizes >= dt_min) & (sizes <= dt_max), grad, 0)
    return grad * torch.sigmoid(dt) if dt_softplus else grad


class _Chunks:
    """The inputs of one call in the accumulation dtype, padded and cut. Padded steps have dt = 0 and change nothing."""

    def __init__(self, x, dt, A, B, C, dt_bias, dt_softplus, dt_min, dt_max, chunk_size):
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.states = B.shape[2:]
        self.per_group = self.heads // self.groups
        self.count, self.steps = chunk_sizes(self.length, chunk_size)
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Apple's GPUs have no float64.
        self.widest = torch.float32 if x.device.type == "mps" else torch.float64
        self.A = A.to(self.dtype).view(self.groups, self.per_group)
        dt = step_sizes(dt.to(self.dtype), dt_bias, dt_softplus, dt_min, dt_max)
        self.dt = self.cut(dt).view(-1, self.steps, self.groups, self.per_group)
        self.x = self.cut(x).view(*self.dt.shape, self.width)
        self.B, self.C = self.cut(B), self.cut(C)
        log_decay = (self.dt * self.A).permute(0, 2, 3, 1)  # (K, G, R, T)
        self.log_decay = log_decay
        # Decay from before the chunk to step t, from step t to the end of the chunk, and over the chunk.
        self.from_start = log_decay.cumsum(-1).exp()
        after = pad(log_decay[..., 1:], (0, 1))
        self.to_end = after.flip(-1).cumsum(-1).flip(-1).exp()
        self.over = log_decay.sum(-1).exp()

    def cut(self, t: Tensor) -> Tensor:
        """(B, L, ...) -> (K, T, ...)."""
        missing = self.steps * self.count - self.length
        t = pad(t.to(self.dtype), (0, 0) * (t.ndim - 2) + (0, missing))
        return t.reshape(self.batch * self.count, self.steps, *t.shape[2:])

    def join(self, t: Tensor) -> Tensor:
        """(K, T, ...) -> (B, L, ...)."""
        return t.reshape(self.batch, self.steps * self.count, *t.shape[2:])[:, : self.length]

    def slabs(self) -> Iterator[slice]:
        """Ranges of chunks to work on at a time."""
        limit = _SLAB.get(self.x.device.type, _SLAB_ELSEWHERE)
        rows = max(1, limit // (self.heads * self.steps**2))
        for first in range(0, max(1, len(self.x)), rows):
            yield slice(first, first + rows)

    def decays(self, slab: slice) -> Tensor:
        """M (k, G, R, T, T): M[..., j, i] is the decay from step j to step i > j, 1 elsewhere."""
        later = torch.ones(self.steps, self.steps, dtype=torch.bool, device=self.x.device).triu(1)
        return torch.where(later, self.log_decay[slab, :, :, None], 0).cumsum(-1).exp()

    def carry(self, ends: Tensor, first: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """Runs value <- decay over the chunk * value + end of the chunk; all are (..., G, N, R, P).

        Returns the values entering each chunk, (K, G, N, R, P), and the value that leaves the last one.
        """
        ends = ends.view(self.batch, self.count, *ends.shape[1:])
        over = self.over.view(self.batch, self.count, self.groups, 1, self.per_group, 1)
        value = torch.zeros_like(ends[:, 0]) if first is None else first
        entering = [value] * self.count
        for chunk in reversed(range(self.count)) if reverse else range(self.count):
            entering[chunk] = value
            value = over[:, chunk] * value + ends[:, chunk]
        return torch.stack(entering, dim=1).flatten(0, 1), value

    def to_states(self, t: Tensor) -> Tensor:
        """(B, H, P, N) -> (B, G, N, R, P)."""
        t = t.to(self.dtype).view(self.batch, self.groups, self.per_group, self.width, self.states)
        return t.permute(0, 1, 4, 2, 3)

    def from_states(self, t: Tensor) -> Tensor:
        """(B, G, N, R, P) -> (B, H, P, N)."""
        return t.permute(0, 1, 3, 4, 2).reshape(self.batch, self.heads, self.width, self.states)

    def collect(self, rows: Tensor, values: Tensor) -> Tensor:
        """sum over t of rows[t] (outer) values[t]: (k, T, G, N), (k, T, G, R, P) -> (k, G, N, R, P)."""
        product = rows.permute(0, 2, 3, 1) @ values.flatten(3).transpose(1, 2)
        return product.unflatten(-1, (self.per_group, self.width))

    def spread(self, rows: Tensor, states: Tensor) -> Tensor:
        """rows[t] . states: (k, T, G, N), (k, G, N, R, P) -> (k, T, G, R, P)."""
        product = rows.transpose(1, 2) @ states.flatten(3)
        return product.unflatten(-1, (self.per_group, self.width)).transpose(1, 2)

    def contract(self, values: Tensor, states: Tensor) -> Tensor:
        """sum over heads and channels: (k, T, G, R, P), (k, G, N, R, P) -> (k, T, G, N)."""
        return (values.flatten(3).transpose(1, 2) @ states.flatten(3).transpose(2, 3)).transpose(1, 2)


def _per_step(t: Tensor) -> Tensor:
    """(k, G, R, T) -> (k, T, G, R, 1), to multiply values of steps."""
    return t.permute(0, 3, 1, 2)[..., None]


def _by_head(t: Tensor) -> Tensor:
    """(k, T, G, R, P) -> (k, G, R, T, P), and back with `_by_step`."""
    return t.permute(0, 2, 3, 1, 4)


def _by_step(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2, 4)


def skip_weights(D: Tensor | None, x: Tensor) -> Tensor | None:
    """D as (H, P), contiguous, for kernels."""
    return D if D is None or D.ndim == 2 else D[:, None].expand(x.shape[2:]).contiguous()


def skip_factor(D: Tensor, dtype: torch.dtype) -> Tensor:
    """D as a factor of (B, L, H, P)."""
    return (D if D.ndim == 2 else D[:, None]).to(dtype)


def _entering_states(c: _Chunks, initial_states: Tensor | None) -> tuple[Tensor, Tensor]:
    ends = c.collect(c.B, _per_step(c.to_end) * c.dt[..., None] * c.x)
    return c.carry(ends, None if initial_states is None else c.to_states(initial_states))


def _scores(c: _Chunks, slab: slice) -> Tensor:
    """(k, G, 1, T, T): B[j] . C[i] for j <= i, zeros elsewhere."""
    return (c.B[slab].transpose(1, 2) @ c.C[slab].permute(0, 2, 3, 1)).triu()[:, :, None]


def ssd_forward(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, chunk_size):
    """out in x's dtype, final states (B, H, P, N) in the accumulation dtype."""
    c = _Chunks(x, dt, A, B, C, dt_bias, dt_softplus, dt_min, dt_max, chunk_size)
    states, final = _entering_states(c, initial_states)
    parts = []
    for slab in c.slabs():
        weights = _scores(c, slab) * c.decays(slab)
        within = weights.transpose(-1, -2) @ _by_head(c.dt[slab][..., None] * c.x[slab])
        parts.append(_by_step(within) + _per_step(c.from_start[slab]) * c.spread(c.C[slab], states[slab]))
    y = c.join(torch.cat(parts).flatten(2, 3))
    if D is not None:
        y = y + x.to(c.dtype) * skip_factor(D, c.dtype)
    if z is not None:
        y = y * silu(z.to(c.dtype))
    return y.to(x.dtype).contiguous(), c.from_states(final)


def ssd_backward(
    grad_out,
    grad_final_states,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_states,
    dt_softplus,
    dt_min,
    dt_max,
    chunk_size,
):
    """Gradients of all inputs in their dtypes; absent optional inputs give empty tensors."""
    c = _Chunks(x, dt, A, B, C, dt_bias, dt_softplus, dt_min, dt_max, chunk_size)
    g = grad_out.to(c.dtype)
    gate = None if z is None else z.to(c.dtype)
    y_grad = g if gate is None else g * silu(gate)
    gc = c.cut(y_grad).view(c.x.shape)
    states, _ = _entering_states(c, initial_states)
    # The gradient of the state that each chunk ends with, and of the first state.
    ends = c.collect(c.C, _per_step(c.from_start) * gc)
    last = None if grad_final_states is None else c.to_states(grad_final_states)
    adjoints, dinitial = c.carry(ends, last, reverse=True)

    parts = []
    for slab in c.slabs():
        xs, dts, gs, Bs, Cs = c.x[slab], c.dt[slab][..., None], gc[slab], c.B[slab], c.C[slab]
        state, adjoint = states[slab], adjoints[slab]
        xdt, start, end = dts * xs, _per_step(c.from_start[slab]), _per_step(c.to_end[slab])
        decays, scores = c.decays(slab), _scores(c, slab)
        weights = scores * decays
        dweights = _by_head(xdt) @ _by_head(gs).transpose(-1, -2)
        dscores = (dweights * decays).sum(2).triu()
        from_state, to_state = c.spread(Cs, state), c.spread(Bs, adjoint)

        dxdt = _by_step(weights @ _by_head(gs)) + end * to_state
        dB = (dscores @ Cs.transpose(1, 2)).transpose(1, 2) + c.contract(end * xdt, adjoint)
        dC = (dscores.transpose(-1, -2) @ Bs.transpose(1, 2)).transpose(1, 2) + c.contract(start * gs, state)

        # Gradients of the exponents. That of the decay from j to i goes to all steps after j up to i: it is added up
        # from i back and taken away again from j on, exactly only in a wider dtype.
        pairs = dweights * weights
        until = pairs.sum(-2, dtype=c.widest) - pairs.sum(-1, dtype=c.widest)
        until = until + (start * from_state * gs).sum(-1).permute(0, 2, 3, 1)
        since = (end * to_state * xdt).sum(-1).permute(0, 2, 3, 1)
        over = c.over[slab] * (adjoint * state).sum((2, 4))
        dlog = until.flip(-1).cumsum(-1).flip(-1).to(c.dtype) + over[..., None]
        dlog = dlog + pad(since.cumsum(-1)[..., :-1], (1, 0))

        y = None
        if gate is not None:
            y = _by_step(weights.transpose(-1, -2) @ _by_head(xdt)) + start * from_state
        parts.append((dxdt * dts, (dxdt * xs).sum(-1), dlog.permute(0, 3, 1, 2), dB, dC, y))

    dx, ddt, dlog, dB, dC, y = (None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True))
    ddt = c.join((ddt + dlog * c.A).flatten(2))
    dx, y = (None if t is None else c.join(t.flatten(2, 3)) for t in (dx, y))
    wide = x.to(c.dtype)
    if D is not None:
        dx = dx + y_grad * skip_factor(D, c.dtype)
    ddt = step_size_gradients(ddt, dt, dt_bias, dt_softplus, dt_min, dt_max)
    dz = x.new_empty((0,))
    if gate is not None:
        out = y if D is None else y + wide * skip_factor(D, c.dtype)
        sigmoid = torch.sigmoid(gate)
        dz = (g * out * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype)
    dD = A.new_empty((0,))
    if D is not None:
        dD = (y_grad * wide).sum((0, 1, 3) if D.ndim == 1 else (0, 1)).to(D.dtype)
    return (
        dx.to(x.dtype).contiguous(),
        ddt.to(dt.dtype).contiguous(),
        (dlog * c.dt).sum((0, 1)).flatten().to(A.dtype),
        c.join(dB).to(B.dtype).contiguous(),
        c.join(dC).to(C.dtype).contiguous(),
        dD,
        dz,
        A.new_empty((0,)) if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
        A.new_empty((0,)) if initial_states is None else c.from_states(dinitial).to(initial_states.dtype),
    )
