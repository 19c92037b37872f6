"""Spelling: the ATen op that a torch function, method or operator stands for.

ATen is the common spelling of normalized graphs: one name per op, and a schema that names every argument and its
default. Nothing is tabulated: torch's names are ATen's names, Python functions of `torch.nn.functional` are matched
to the schema by argument name, and torch's own resolution picks the overload for the values at hand.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._jit_internal import boolean_dispatched

from fxinvert.rules import key_of

#: what an operator means when its first operand is a number: ATen's first argument is always the tensor
_REVERSED = {"add": "add", "mul": "mul", "sub": "rsub"}
#: argument names of torch.nn.functional that differ from ATen's
_ARGUMENTS = {"input": "self", "training": "train"}
#: arguments that change where a result is stored or how a warning reads, not what is computed
_WITHOUT_EFFECT = ("inplace", "_stacklevel")


class Call(NamedTuple):
    """An ATen op with arguments by position and name."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def to_aten(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value_of: Callable[[Any], Any]
) -> Call | None:
    """The functional (not in-place) ATen call for a call of `function`, or None if there is none.

    Args:
        function: a torch function, an operator, an ATen op, or the name of a tensor method.
        args, kwargs: what it is called with, values or anything that stands for them.
        value_of: maps (nested) arguments to the values that decide which overload is meant.
    """
    name = _aten_name(function)
    if len(args) == 2 and isinstance(value_of(args[0]), int | float) and name in _REVERSED:
        name, args = _REVERSED[name], (args[1], args[0])
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    renamed = {_ARGUMENTS.get(name, name): value for name, value in kwargs.items()}
    for candidate in (_by_name(function, packet, args, kwargs), (args, renamed), (_packed(args), renamed)):
        if candidate is None:
            continue
        values, named = value_of(candidate)
        try:
            overload = torch._C._jit_resolve_packet(packet._qualified_op_name, *values, **named)
        except RuntimeError:
            continue
        return _positional(getattr(packet, overload or "default"), *candidate)
    return None


def is_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call changes its first argument."""
    if isinstance(function, torch._ops.OpOverload):
        return bool(function._schema.is_mutable)
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    bound = _bound(function, args, kwargs)
    return bool(bound and bound.get("inplace", False))


def _aten_name(function: Any) -> str | None:
    """The ATen name of one of torch's functions, methods or operators; None for anything else."""
    if isinstance(function, torch._ops.OpOverload):
        return key_of(function) if function.namespace == "aten" else None
    module = "torch" if isinstance(function, str) else getattr(function, "__module__", None) or "torch"
    return key_of(function) if module.split(".")[0] in ("torch", "_operator") else None


def _bound(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a Python function by name, or None where there is no Python signature."""
    function = boolean_dispatched[function]["if_false"] if function in boolean_dispatched else function
    if isinstance(function, str) or not inspect.isfunction(function):
        return None
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def _by_name(
    function: Callable[..., Any],
    packet: torch._ops.OpOverloadPacket,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of a Python function, renamed to those of the first overload whose schema has all that matter."""
    bound = _bound(function, args, kwargs)
    if bound is None:
        return None
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        known = [argument.name for argument in schema.arguments]
        if "out" in known:
            continue
        renamed = {
            name if name in known else _ARGUMENTS.get(name, name): value for name, value in bound.items()
        }
        lost = [value for name, value in renamed.items() if name not in known and name not in _WITHOUT_EFFECT]
        if any(value is not None and value is not False for value in lost):
            continue
        chosen = {
            a.name: renamed[a.name]
            for a in schema.arguments
            if a.name in renamed and not (renamed[a.name] is None and a.has_default_value())
        }
        if "cudnn_enabled" in known:
            chosen["cudnn_enabled"] = torch.backends.cudnn.enabled
        return (), chosen
    return None


def _positional(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call with its arguments by position, as far as they follow one another, so that equal calls look equal."""
    rest, leading = dict(kwargs), list(args)
    for argument in op._schema.arguments[len(args) :]:
        if argument.kwarg_only or argument.name not in rest:
            break
        leading.append(rest.pop(argument.name))
    return Call(op, tuple(leading), rest)


def _packed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`x.view(2, -1)` → `x.view([2, -1])`: methods take as many sizes as one likes, schemas take a list."""
    return (args[0], list(args[1:])) if args else args
