"""Calls: what they give, anew or again, whether they change what they are given, and whether two of them mean the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.passes.leaves import leaves

#: what `evaluate` returns for a call that changes what it is given
CHANGED = object()


def evaluate(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a call, or `CHANGED` if it changes one of its arguments; ATen's functional ops never do."""
    if isinstance(function, torch._ops.OpOverload) and not function._schema.is_mutable:
        return function(*args, **kwargs)
    tensors = [value for value in leaves((args, kwargs)) if isinstance(value, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    value = function(*args, **kwargs)
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, tensors, strict=True))
    return value if same else CHANGED


def given_again(op: Any, args: tuple[Any, ...], values: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The earlier value that a call gives again: of a transposition undone, or of one tensor that is joined with none.

    Args:
        op: an ATen op.
        args: its arguments.
        values: of the nodes so far.
    """
    given: Any = args[0] if args else None
    if op is torch.ops.aten.cat.default:
        return given[0] if isinstance(given, list) and len(given) == 1 else None
    if op is not torch.ops.aten.transpose.int or given.target is not op:
        return None
    axes = ({a % values[given].dim() for a in swapped[1:]} for swapped in (given.args, args))
    before: fx.Node = given.args[0]
    return before if len({frozenset(pair) for pair in axes}) == 1 else None


def kind(value: Any) -> Any:
    """What decides which op is meant: of a tensor its dtype and number of axes, any other value itself, containers opened."""
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if isinstance(value, tuple | list):
        return type(value), [kind(item) for item in value]
    return {name: kind(item) for name, item in value.items()} if isinstance(value, dict) else value


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same up to rounding, which differs with where a copy lies in memory."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    digits = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=digits, atol=digits, equal_nan=True)


def shares_memory(a: Any, b: Any) -> bool:
    """Whether two values are tensors that lie, at least in part, in the same memory."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
