"""PyTorch's own operator samples, as modules and batches that rules can be checked with.

`torch.testing._internal` is private, so everything that knows it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fxinvert.rules import RuleSet, key_of

pytest.importorskip("expecttest", reason="PyTorch's operator samples need the package expecttest")
from torch.testing._internal.common_methods_invocations import op_db


class Called(nn.Module):
    """A call of an operator with everything but its first argument held."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x, *self.args, **self.kwargs)
        return result


class Sample(NamedTuple):
    """A call and a batch for it."""

    call: Called
    batch: Tensor

    def __str__(self) -> str:
        return f"{tuple(self.batch.shape)}, {self.call.args}, {self.call.kwargs}"


def operators(rules: RuleSet) -> list[Any]:
    """The operators that have a rule, one entry per operator and variant."""
    return [info for info in op_db if _key(info) in rules and info.supports_autograd]


def samples(info: Any, limit: int) -> Iterator[Sample]:
    """The first samples that are a batch: floating-point, not empty, and computed row by row."""
    found = 0
    for given in info.sample_inputs("cpu", torch.float64, requires_grad=False):
        x = given.input
        if found == limit:
            return
        if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel() or not x.is_floating_point():
            continue
        if not any(isinstance(value, Tensor) and value.is_sparse for value in given.args):
            call = Called(info.op, given.args, given.kwargs).eval()
            if _row_by_row(call, x):
                found += 1
                yield Sample(call, x.detach())


def _key(info: Any) -> str:
    # torch.masked and torch.linalg have functions of the same names that are other ops; some have no name at all
    plain = "." not in info.name.removeprefix("nn.functional.") and hasattr(info.op, "__name__")
    return key_of(info.op) if plain else ""


def _row_by_row(call: Called, x: Tensor) -> bool:
    """Whether the first axis is a batch: a row's result is its own, wherever it stands and however many there are."""
    try:
        whole, turned, more = call(x), call(x.flip(0)), call(torch.cat([x, x[:1]]))
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    if not isinstance(whole, Tensor) or not whole.is_floating_point() or not whole.dim() or not whole.numel():
        return False
    if any(isinstance(value, Tensor) for value in call.args) and whole.shape != x.shape:
        return False  # the other operand makes copies of the input first: that is an op of its own
    if len(whole) != len(x) or more.shape != (len(x) + 1, *whole.shape[1:]):
        return False
    same = torch.allclose(more[:-1], whole) and torch.allclose(turned.flip(0), whole)
    return same and bool(torch.isfinite(whole).all())
