"""Lengths: sizes that vary with the batch where Python wants numbers, which would be the example's.

`len(x)` gives a number, and so does `int`. Code asks for it where it divides, of which torch keeps that it may round:

    batch = int(windows.shape[0] / (height * width / size**2))
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from fxinvert.passes.batched import Batched
from fxinvert.passes.packed import packing_followed
from fxinvert.passes.strided import Windowed, surely


@contextmanager
def lengths_followed(model: nn.Module) -> Iterator[None]:
    """Runs the body with lengths in the modules' code that vary, of batches and of packed sequences; views by strides as
    windows, and what such lengths are cut into as equal parts.

    Python wants a number of `len(x)`, which would be the example's; here it gives a size, as `x.shape[0]` does.
    """
    scopes = _scopes(model)
    measured = [scope for scope in scopes if "len" not in scope]
    for scope in measured:
        scope["len"] = _length
    try:
        with packing_followed(scopes), Windowed(), Batched():
            yield
    finally:
        for scope in measured:
            del scope["len"]


@contextmanager
def whole_sizes(model: nn.Module) -> Iterator[None]:
    """Runs the body with the code of a model's modules, and of functions that it has imported, taking `_Whole` for `int`."""
    scopes = {id(scope): scope for scope in _scopes(model)}
    for value in [value for scope in scopes.values() for value in scope.values()]:
        if isinstance(value, FunctionType) and not value.__module__.startswith(("torch.", "fxinvert.")):
            scopes.setdefault(id(value.__globals__), value.__globals__)
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.SymInt, "__truediv__", _divides))
        for scope in scopes.values():
            if "int" not in scope:
                stack.enter_context(patch.dict(scope, {"int": _Whole}))
        yield


def _scopes(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of the modules' code, torch's own left out."""
    found = {
        id(scope): scope
        for kind in {type(module): None for module in model.modules()}
        for base in kind.__mro__
        if "forward" in vars(base)
        and not base.__module__.startswith("torch.")
        and (scope := getattr(inspect.unwrap(vars(base)["forward"]), "__globals__", None)) is not None
    }
    return list(found.values())


def _length(value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", len, (value,), {})
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else len(value)


class _Kind(type):
    """Makes a class be `int`, but for what it gives for sizes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        # what has no hint is read off data, which tell no size of the batch
        sized = bool(args) and isinstance(args[0], torch.SymInt | torch.SymFloat) and args[0].node.has_hint()
        return torch.sym_int(args[0]) if sized else int(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __eq__(cls, other: object) -> bool:
        return other is int or other is cls

    def __hash__(cls) -> int:
        return hash(int)


class _Whole(int, metaclass=_Kind):
    """`int`, which leaves sizes that vary as they are."""


_divided = torch.SymInt.__truediv__


def _divides(size: torch.SymInt, by: Any) -> Any:
    """`size / by`, as a size where nothing is left over."""
    whole = isinstance(by, int | float) and by == int(by) != 0
    if whole and surely(size % int(by) == 0):
        return size // int(by)
    return _divided(size, by)  # type: ignore[no-untyped-call]
