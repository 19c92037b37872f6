"""Convolutions with held kernels: their derivatives are those in the input alone, of any order, and in either mode.

torch differentiates a convolution in its kernel as well wherever it differentiates twice, or in forward mode, wanted or not:
one convolution or two more for every product, and many for a grouped one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import Function

from fxinvert.linalg.convolution import CONVOLUTION, Convolution


def held_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
) -> Tensor:
    """The convolution of `input`, `(B, c_in, *spatial)`, as in torch, in 1 to 3 dimensions; it is differentiated in `input` alone."""
    sliding = (stride, padding, dilation, groups)
    if input.dim() != weight.dim():  # a map without a batch
        return CONVOLUTION[weight.dim() - 2][0](input, weight, bias, *sliding)
    found: Tensor = _Pushed.apply(input, weight.detach(), bias, sliding)  # type: ignore[no-untyped-call]
    return found


class _Pushed(Function):
    """x ↦ W ∗ x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sliding: tuple[Any, ...]) -> Tensor:
        ctx.weight, ctx.sliding, ctx.shape, ctx.operator = weight, sliding, x.shape[1:], None
        return CONVOLUTION[weight.dim() - 2][0](x, weight, bias, *sliding)

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.operator is None:
            *given, groups = ctx.sliding
            stride, padding, dilation = (_each(value, ctx.weight.dim() - 2) for value in given)
            ctx.operator = Convolution(ctx.weight, ctx.shape, stride, padding, dilation, groups)
        return _Pulled.apply(r, ctx.operator), None, None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return CONVOLUTION[ctx.weight.dim() - 2][0](x, ctx.weight, None, *ctx.sliding)


class _Pulled(Function):
    """The adjoint of x ↦ W ∗ x."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, operator: Convolution) -> Tensor:
        ctx.operator = operator
        return operator.adjoint(r)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        sliding = tuple(ctx.operator.options.values())
        return _Pushed.apply(x, ctx.operator.weight, None, sliding), None  # type: ignore[no-untyped-call]


def _each(value: Sequence[int] | int, axes: int) -> Sequence[int]:
    """A number for every axis."""
    return [value] * axes if isinstance(value, int) else [*value] * (axes // len(value))
