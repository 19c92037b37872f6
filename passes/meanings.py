"""Meanings: whether an ATen call gives what the user's call gives.

A number may mean two things to two overloads, and a function of `torch.nn.functional` may be another than the ATen op of its
name; on the example's values both are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxinvert.passes.calls import agree, kind
from fxinvert.passes.leaves import any_tensor, copied, leaves
from fxinvert.passes.spelling import Call


class Meanings:
    """What was found out, so that nothing is tried twice.

    What holds for a call holds for every other with the same numbers, and tensors of the same kinds.

    Args:
        value_of: maps (nested) arguments to their values in the example run.
    """

    def __init__(self, value_of: Callable[[Any], Any]) -> None:
        self.value_of = value_of
        self._same: dict[str, bool] = {}

    def same(self, call: Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an ATen call on tensors gives what `function` gives."""
        values, named = self.value_of((call.args, call.kwargs))
        if not any_tensor((values, named)):
            return False
        if isinstance(function, torch._ops.OpOverload):
            return True
        given, options = self.value_of((args, kwargs))
        signature = repr((function, call.op, kind((given, options)), kind((values, named))))
        if signature not in self._same:
            given, options = copied((given, options))
            meant = getattr(type(given[0]), function, call.op) if isinstance(function, str) else function
            self._same[signature] = _gives(call.op, values, named, meant(*given, **options))
        return self._same[signature]


def _gives(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether a call of an op gives a result."""
    try:
        value = op(*args, **kwargs)
    except RuntimeError:  # it takes the number, but not as what it is meant
        return False
    if isinstance(result, torch.Size) or isinstance(result, Tensor) != isinstance(value, Tensor):
        return False  # ATen gives sizes as a list, and a list cannot be joined with a tuple
    pairs = zip(leaves(result), leaves(value), strict=False)
    return all(agree(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)
