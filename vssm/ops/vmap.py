"""What `torch.func.vmap` does with the ops: the vmapped dimension joins the batch where it can.

Gradients of vmapped calls come from `torch.autograd`; `torch.func.grad` takes no custom op of torch.library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor


def register_vmap(forward_op, backward_op, per_item: Collection[int]) -> None:
    """Makes an op and its backward op work under vmap.

    `per_item` are the places of the forward op's arguments that begin with the batch, as all its results must. They
    are folded into one call with a larger batch, unless another argument, a parameter, is vmapped as well. Then, and
    in the backward pass, whose gradients of parameters are sums over the batch, the op is called once for each index.
    """
    forward_op.register_vmap(_folded(forward_op, per_item))
    backward_op.register_vmap(_looped(backward_op))


def _folded(op, per_item: Collection[int]) -> Callable:
    looped = _looped(op)

    def rule(info, in_dims, *arguments):
        if any(dim is not None and place not in per_item for place, dim in enumerate(in_dims)):
            return looped(info, in_dims, *arguments)
        folded = list(arguments)
        for place in per_item:
            tensor, dim = arguments[place], in_dims[place]
            if tensor is not None:
                whole = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
                folded[place] = whole.flatten(0, 1).contiguous()
                batch = whole.shape[1]
        return _each(lambda result: result.unflatten(0, (info.batch_size, batch)), op(*folded))

    return rule


def _looped(op) -> Callable:
    def rule(info, in_dims, *arguments):
        results = []
        for index in range(info.batch_size):
            pairs = zip(arguments, in_dims, strict=True)
            results.append(op(*(x if dim is None else x.select(dim, index).contiguous() for x, dim in pairs)))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return _each(torch.stack, tuple(zip(*results, strict=True)))

    return rule


def _each(function: Callable, results) -> tuple:
    """`function` of one result or of each, and 0 as the place of the vmapped dimension in each."""
    if isinstance(results, Tensor):
        return function(results), 0
    return tuple(map(function, results)), (0,) * len(results)
