"""Forms: ATen calls that differ in how their operands are arranged, brought to one form."""

from __future__ import annotations

import operator
from collections.abc import Callable
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
#: products without a bias, and the same with it
_WITH_BIAS: dict[Any, Callable[..., Call]] = {
    ATEN.linear.default: lambda x, weight, bias: Call(ATEN.linear.default, (x, weight, bias), {}),
    ATEN.matmul.default: lambda x, weight, bias: Call(ATEN.addmm.default, (bias, x, weight), {}),
    ATEN.mm.default: lambda x, weight, bias: Call(ATEN.addmm.default, (bias, x, weight), {}),
}


def arranged(call: Call) -> Call:
    """The call in the form that rules and training know: its input first, a layer written as `x @ weight.T + bias` one op."""
    if call.kwargs or len(call.args) != 2:
        return call
    first, second = call.args
    if call.op in _EXCHANGED and _active(second) and not _active(first):
        first, second = second, first
        call = Call(_EXCHANGED[call.op], (first, second), {})
    if call.op is ATEN.linear.default and _is_vector(second):
        return Call(ATEN.matmul.default, (first, second), {})
    if call.op in _PRODUCTS and _active(first) and _is_transposed(second):
        return Call(ATEN.linear.default, (first, second.args[0]), {})
    if call.op is ATEN.add.Tensor and _is_bias(second, first):
        return _WITH_BIAS[first.target](*first.args, second)
    return call


def by_position(function: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A call that reads a field of a named tuple, as in `x.max(1).values`, by its position: ATen's have no names.

    So is `x.data`, which is `x.detach()`.
    """
    if function is getattr and args[1] == "data" and isinstance(args[0], fx.Node):
        return ATEN.detach.default, args[:1]
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


def _is_vector(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and len(argument.meta["tensor_meta"].shape) == 1


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


def _is_bias(vector: Any, product: Any) -> bool:
    """Whether a parameter or constant is added, one number an output, to a product with another that nothing else reads."""
    if not isinstance(product, fx.Node) or product.target not in _WITH_BIAS or product.users:
        return False
    if not isinstance(vector, fx.Node) or vector.op != "get_attr" or len(product.args) != 2:
        return False
    given, matrix = (n.meta["tensor_meta"].shape for n in product.args)  # type: ignore[union-attr]
    outputs = product.meta["tensor_meta"].shape[-1:]
    if product.target is not ATEN.linear.default and (len(given) != 2 or len(matrix) != 2):
        return False
    return product.args[1].op == "get_attr" and vector.meta["tensor_meta"].shape == outputs  # type: ignore[union-attr]
