"""Forms: ATen calls that differ in how their operands are arranged, brought to one form."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxinvert.passes.spelling import Call

ATEN = torch.ops.aten
#: f(constant, x) → g(x, constant): what comes from the model's input is always the first operand
_EXCHANGED = {
    ATEN.add.Tensor: ATEN.add.Tensor,
    ATEN.mul.Tensor: ATEN.mul.Tensor,
    ATEN.sub.Tensor: ATEN.rsub.Tensor,
}
_PRODUCTS = (ATEN.matmul.default, ATEN.mm.default, ATEN.linalg_matmul.default)
#: what transposes a matrix, with the arguments behind it
_TRANSPOSES: dict[Any, tuple[tuple[Any, ...], ...]] = {
    getattr: (("T",), ("mT",)),
    ATEN.t.default: ((),),
    ATEN.numpy_T.default: ((),),
    ATEN.transpose.int: ((0, 1), (1, 0), (-1, -2), (-2, -1)),
    ATEN.permute.default: (([1, 0],),),
}


def arranged(call: Call) -> Call:
    """The call in the form that rules and training know: its input first, a layer written as `x @ weight.T` a linear one."""
    if call.kwargs or len(call.args) != 2:
        return call
    first, second = call.args
    if call.op in _EXCHANGED and _active(second) and not _active(first):
        return Call(_EXCHANGED[call.op], (second, first), {})
    if call.op in _PRODUCTS and _active(first) and _is_transposed(second):
        return Call(ATEN.linear.default, (first, second.args[0]), {})
    return call


def by_position(function: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A call that reads a field of a named tuple, as in `x.max(1).values`, by its position: ATen's have no names."""
    if (
        function is getattr
        and isinstance(args[0], fx.Node)
        and isinstance(args[0].target, torch._ops.OpOverload)
    ):
        fields = [given.name for given in args[0].target._schema.returns]
        if len(fields) > 1 and args[1] in fields:
            return operator.getitem, (args[0], fields.index(args[1]))
    return function, args


def _active(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and bool(argument.meta["active"])


def _is_transposed(argument: Any) -> bool:
    """Whether an operand is a parameter or constant of the model, a matrix, transposed."""
    if not isinstance(argument, fx.Node) or tuple(argument.args[1:]) not in _TRANSPOSES.get(
        argument.target, ()
    ):
        return False
    matrix = argument.args[0]
    return (
        isinstance(matrix, fx.Node) and matrix.op == "get_attr" and len(matrix.meta["tensor_meta"].shape) == 2
    )
