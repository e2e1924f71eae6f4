"""The attention hidden in a selective scan (Ali, Zimerman, Wolf, arXiv 2403.01590, section 4).

A scan is linear in its input once dt, B and C are known: y_i = sum_j alpha_ij x_j for every channel, with
alpha_ij = sum_n C_i[n] exp(A[n] (dt_{j+1} + ... + dt_i)) dt_j B_j[n] for j <= i. A row of alpha is therefore the
gradient of y_i with respect to x, which the op's own backward pass gives without ever building the matrix.

Letters: B batch, P positions, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Op -> (axis of the positions in its first argument, places of the skip D and the gate z, which are left out).
_SCANS = {
    "selective_scan_forward": (2, (5, 6)),
    "local_bidirectional_scan_forward": (2, (5, 6)),
    "cross_selective_scan_forward": (1, (5,)),
    "ssd_forward": (1, (5, 6)),
    "nc_ssd_forward": (1, (5,)),
}


@dataclass(frozen=True)
class ScanCall:
    """One call of a scan op in a forward pass, with what it was given.

    Args:
        layer: name of the innermost module that made the call, as in `model.named_modules()`.
        op: name of the op.
        positions: length of the sequence, or number of positions of the map, that the op walks.
    """

    layer: str
    op: str
    positions: int
    _function: Callable
    _arguments: tuple

    def attention(self, queries: Sequence[int] | None = None) -> Tensor:
        """How much every position contributes to the output at each query, averaged over channels, with its sign.

        For a scan along several routes the contributions of all routes are added. The skip connection D and the gate
        are not part of it.

        Args:
            queries: positions of the op's input whose rows are wanted; all if None, which takes P backward passes.

        Returns:
            float tensor (B, Q, P).

        Raises:
            ValueError: a query outside 0..P-1.
        """
        queries = range(self.positions) if queries is None else queries
        for query in queries:
            if not 0 <= query < self.positions:
                raise ValueError(f"{self.layer}: query {query} must lie between 0 and {self.positions - 1}")
        axis, dropped = _SCANS[self.op]
        arguments = [None if place in dropped else value for place, value in enumerate(self._arguments)]
        with torch.inference_mode(False), torch.enable_grad():
            # What a model made in inference mode cannot be differentiated; copies made here can.
            arguments = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
            x = arguments[0].requires_grad_()
            y = self._function(x, *arguments[1:])
            y = y if isinstance(y, Tensor) else y[0]
            rows = []
            for query in queries:
                chosen = torch.zeros_like(y)
                chosen.select(axis, query).fill_(1.0)
                (row,) = torch.autograd.grad(y, x, chosen, retain_graph=True)
                rows.append(row.movedim(axis, 1).flatten(2).float().mean(2))
        return torch.stack(rows, dim=1).detach()


class _Recorder(TorchDispatchMode):
    """Keeps the scans that run while it is active; `path` is the stack of names of the modules being called."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = [""]
        self.calls: list[ScanCall] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("vssm::") if function.namespace == "vssm" else ""
        if name in _SCANS:
            positions = arguments[0].shape[_SCANS[name][0]]
            kept = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
            self.calls.append(ScanCall(self.path[-1], name, positions, function, kept))
        return function(*arguments, **(options or {}))


def scan_calls(model: nn.Module, images: Tensor) -> list[ScanCall]:
    """Every scan of one forward pass of `model` on `images` (B, C, H, W), in the order of execution.

    Raises:
        ValueError: no scan ran, so that there is no hidden attention to show.
    """
    recorder = _Recorder()
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: recorder.path.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: recorder.path.pop() and None, always_call=True))
    try:
        with torch.no_grad(), recorder:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not recorder.calls:
        raise ValueError(f"no scan of vssm ran in {type(model).__name__}, so it has no hidden attention")
    return recorder.calls


def hidden_attention(
    model: nn.Module, images: Tensor, layer: int | str = -1, queries: Sequence[int] | None = None
) -> Tensor:
    """Hidden attention of one scan of a model, see `ScanCall.attention`.

    Args:
        model: any model whose forward pass calls scans of vssm.
        images: (B, C, H, W).
        layer: which scan, by its place in the order of execution or by the name of its module (the first call of it).
        queries: positions whose rows are wanted; None for all.

    Returns:
        float tensor (B, Q, P).

    Raises:
        ValueError: there is no such layer or query.
    """
    calls = scan_calls(model, images)
    if isinstance(layer, str):
        found = [call for call in calls if call.layer == layer]
        if not found:
            names = ", ".join(dict.fromkeys(call.layer for call in calls))
            raise ValueError(f"no scan runs in layer {layer!r}; scans run in {names}")
        return found[0].attention(queries)
    if not -len(calls) <= layer < len(calls):
        raise ValueError(f"layer {layer} does not exist; the model runs {len(calls)} scans")
    return calls[layer].attention(queries)
