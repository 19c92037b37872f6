"""Spelling: the ATen op that a torch function, method or operator stands for.

ATen is the common spelling of normalized graphs: one name per op, and a schema that names every argument and its
default. Little is tabulated: torch's names are ATen's names but for a few synonyms, Python functions of
`torch.nn.functional` are matched to the schema by argument name, and torch's own resolution picks the overload for
the values at hand. Arguments are brought to one form too, so that equal calls look equal: in the schema's order and
types, by position, without those at the end that have their default value.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._jit_internal import boolean_dispatched

from fxinvert.rules import key_of

#: what an operator means when its first operand is a number: ATen's first argument is always the tensor
_REVERSED = {"add": "add", "mul": "mul", "sub": "rsub"}
#: ops that torch has under two names
_SYNONYMS = {
    "absolute": "abs",
    "divide": "div",
    "multiply": "mul",
    "negative": "neg",
    "special_expit": "sigmoid",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
}
#: ops that are another with some arguments fixed
_SPECIAL = {"relu6": ("hardtanh", (0.0, 6.0))}
#: argument names of torch.nn.functional that differ from ATen's
_ARGUMENTS = {"input": "self", "training": "train"}
#: arguments that change where a result is stored or how a warning reads, not what is computed
_WITHOUT_EFFECT = ("inplace", "_stacklevel")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
ValueOf = Callable[[Any], Any]


class Call(NamedTuple):
    """An ATen op with arguments by position and name."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def to_aten(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value_of: ValueOf
) -> Iterator[Call]:
    """The functional (not in-place) ATen calls that a call of `function` may stand for, the likeliest first.

    There is more than one where a number may mean two things, as in `x.std(-1)`, to two overloads.

    Args:
        function: a torch function, an operator, an ATen op, or the name of a tensor method.
        args, kwargs: what it is called with, values or anything that stands for them.
        value_of: maps (nested) arguments to the values that decide which overload is meant.
    """
    name = _aten_name(function)
    if len(args) == 2 and isinstance(value_of(args[0]), int | float) and name in _REVERSED:
        name, args = _REVERSED[name], (args[1], args[0])
    if name in _SPECIAL:
        name, fixed = _SPECIAL[name]
        function, args, kwargs = None, (args[0] if args else kwargs["input"], *fixed), {}
    if function == "where":  # the method's tensor is what ATen takes second
        args = (args[1], args[0], *args[2:])
    if name == "pow" and len(args) == 2 and args[1] == 2:
        name, args = "square", args[:1]
    # another library's op, called without its overload, is resolved like ATen's
    packet = getattr(torch.ops.aten, name, None) if name else function
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return
    written = _candidates(function, packet, args, kwargs, value_of)
    for candidate in (form for way in written for form in chain([way], _typed_forms(packet, *way, value_of))):
        values, named = value_of(candidate)
        try:
            overload = torch._C._jit_resolve_packet(packet._qualified_op_name, *values, **named)
        except RuntimeError:
            continue
        yield _canonical(getattr(packet, overload or "default"), *candidate, value_of)


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
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        key = key_of(function)
        return None if "::" in key else _SYNONYMS.get(key, key)
    module = "torch" if isinstance(function, str) else getattr(function, "__module__", None) or "torch"
    if module.split(".")[0] not in ("torch", "_operator"):
        return None
    key = key_of(function)
    return _SYNONYMS.get(key, key)


def _candidates(
    function: Any,
    packet: torch._ops.OpOverloadPacket,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    value_of: ValueOf,
) -> Iterator[Arguments]:
    """The ways to pass a call's arguments to an ATen op, most trusted first."""
    bound = _bound(function, args, kwargs)
    if bound is not None:
        by_name = _by_name(bound, packet)
        if by_name is not None:
            yield by_name
        if function.__module__ == "torch.nn.functional":
            return  # its order of arguments is its own, and so may be what it returns
    if _takes_sizes(packet) and len(args) > 1 and all(isinstance(a, int) for a in value_of(args[1:])):
        # `x.view(2, -1)` → `x.view([2, -1])`: methods take as many sizes as one likes, schemas take a list
        args = (args[0], list(args[1:]))
    yield args, kwargs
    yield args, {_ARGUMENTS.get(name, name): value for name, value in kwargs.items()}
    # `torch.einsum(equation, a, b)`: functions take as many tensors as one likes, schemas take a list
    tensors = [isinstance(value, Tensor) for value in value_of(args)]
    first = tensors.index(True) if True in tensors else len(tensors)
    if first < len(tensors) and all(tensors[first:]):
        yield (*args[:first], list(args[first:])), kwargs


@functools.cache
def _takes_sizes(packet: torch._ops.OpOverloadPacket) -> bool:
    """Whether an op takes a tensor and a list of sizes or axes, as view, permute, repeat and flip do."""
    schema = getattr(packet, packet._overload_names[0])._schema.arguments
    positional = [str(a.type) for a in schema if not a.kwarg_only]
    return positional == ["Tensor", "List[int]"]


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


def _by_name(bound: dict[str, Any], packet: torch._ops.OpOverloadPacket) -> Arguments | None:
    """Arguments of a Python function, renamed to those of the first overload whose schema has all that matter."""
    for overload in packet._overload_names:
        schema = getattr(packet, overload)._schema
        known = [argument.name for argument in schema.arguments]
        if "out" in known or len(schema.returns) != 1:
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


def _typed_forms(
    packet: torch._ops.OpOverloadPacket, args: tuple[Any, ...], kwargs: dict[str, Any], value_of: ValueOf
) -> Iterator[Arguments]:
    """The arguments in the types of each overload: torch takes one number for several sizes, its resolution does not."""
    for overload in packet._overload_names:
        schema = getattr(packet, overload)._schema.arguments
        known = [argument.name for argument in schema]
        given = dict(zip(known, args, strict=False)) | kwargs
        if len(args) <= len(known) and "out" not in known and all(name in known for name in given):
            yield (), {a.name: _typed(a, given[a.name], value_of) for a in schema if a.name in given}


def _canonical(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], value_of: ValueOf
) -> Call:
    """The call in the one form that all its spellings share."""
    schema = op._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    given = {a.name: _typed(a, given[a.name], value_of) for a in schema if a.name in given}
    if (
        "kernel_size" in given
        and given.get("stride", []) in ([], None)
        and any(a.name == "stride" for a in schema)
    ):
        given["stride"] = given["kernel_size"]  # what pooling without a stride means
    positional = [a for a in schema if not a.kwarg_only]
    while positional and _is_default(positional[-1], given):
        positional.pop()
    named = {a.name: given[a.name] for a in schema if a.kwarg_only and not _is_default(a, given)}
    return Call(op, tuple(given.get(a.name, a.default_value) for a in positional), named)


def _is_default(argument: Any, given: dict[str, Any]) -> bool:
    if not argument.has_default_value():
        return False
    return argument.name not in given or bool(given[argument.name] == argument.default_value)


def _typed(argument: Any, value: Any, value_of: ValueOf) -> Any:
    """A literal in the type that the schema names: `2` → `[2, 2]` for two sizes, `(1, 2)` → `[1, 2]`, `1` → `1.0`."""
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        value = list(value)
        return value * argument.N if argument.N and len(value) == 1 else value
    literal = value_of(value)
    if argument.N and isinstance(literal, int):
        return [value] * argument.N
    if isinstance(argument.type, torch.FloatType) and isinstance(value, int):
        return float(value)
    return value
