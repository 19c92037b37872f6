"""Translations to ONNX of special functions, by approximations that are good to float32's last digits; they compute in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

DOUBLE = 11
#: of Acklam's approximation of the normal distribution's quantile function (relative error 1.15e-9): numerators and denominators,
#: highest power first, in the middle and in the tails, which begin at this probability
MIDDLE = (
    (
        -39.69683028665376,
        220.9460984245205,
        -275.9285104469687,
        138.3577518672690,
        -30.66479806614716,
        2.506628277459239,
    ),
    (-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972, -13.28068155288572, 1.0),
)
TAILS = (
    (
        -7.784894002430293e-03,
        -0.3223964580411365,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ),
    (7.784695709041462e-03, 0.3224671290700398, 2.445134137142996, 3.754408661907416, 1.0),
)
TAIL = 0.02425
#: of Stirling's series, from 1 / x on, by every other power: Bernoulli's numbers over 2k (2k − 1)
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680)
#: arguments below are raised by so much before the series
RAISED = 8


def erfinv(values: Any) -> Any:
    """The inverse of the error function."""
    ops = _Ops(values)
    x = ops.cast(values)
    return ops.back(ops.scaled(_quantile(ops, x, ops.affine(ops.op.Abs(x), -0.5, 0.5)), 1 / math.sqrt(2)))


def ndtri(values: Any) -> Any:
    """The quantile function of the normal distribution."""
    ops = _Ops(values)
    p = ops.cast(values)
    return ops.back(_quantile(ops, ops.affine(p, 2, -1), ops.op.Min(p, ops.affine(p, -1, 1))))


def _quantile(ops: _Ops, twice: Any, tail: Any) -> Any:
    """Of probabilities (1 + `twice`) / 2, the smaller of which and the rest is `tail`."""
    op = ops.op
    half = ops.scaled(twice, 0.5)
    square = op.Mul(half, half)
    middle = op.Div(op.Mul(half, ops.polynomial(square, MIDDLE[0])), ops.polynomial(square, MIDDLE[1]))
    far = op.Sqrt(ops.scaled(op.Log(tail), -2))
    end = op.Div(ops.polynomial(far, TAILS[0]), ops.polynomial(far, TAILS[1]))
    end = op.Where(op.IsInf(far), ops.scaled(far, -1), end)
    found = op.Where(op.Less(tail, ops.number(TAIL)), op.Mul(end, ops.scaled(op.Sign(half), -1)), middle)
    return op.Where(op.IsNaN(twice), twice, found)


def lgamma(values: Any) -> Any:
    """log |Γ|: Stirling's series; below ½ by reflection, log |π / sin πx| − log Γ(1 − x)."""
    ops = _Ops(values)
    op, x = ops.op, ops.cast(values)
    low = op.Less(x, ops.number(0.5))
    z = op.Where(low, ops.affine(x, -1, 1), x)
    product, raised = z, ops.affine(z, 1, RAISED)
    for k in range(1, RAISED):
        product = op.Mul(product, ops.affine(z, 1, k))
    inverse = op.Reciprocal(raised)
    series = op.Mul(inverse, ops.polynomial(op.Mul(inverse, inverse), STIRLING[::-1]))
    main = op.Sub(op.Mul(ops.affine(raised, 1, -0.5), op.Log(raised)), raised)
    found = op.Add(ops.affine(main, 1, 0.5 * math.log(2 * math.pi)), op.Sub(series, op.Log(product)))
    beyond = op.Greater(z, ops.number(1e10))  # so large that nothing need be raised, and products overflow
    found = op.Where(beyond, op.Mul(z, ops.affine(op.Log(z), 1, -1)), found)
    other = op.Sub(ops.affine(op.Log(op.Abs(_sine(ops, x))), -1, math.log(math.pi)), found)
    return ops.back(op.Where(low, other, found))


def digamma(values: Any) -> Any:
    """(log Γ)': its asymptotic series; below ½ by reflection, ψ(1 − x) − π cot πx."""
    ops = _Ops(values)
    op, x = ops.op, ops.cast(values)
    low = op.Less(x, ops.number(0.5))
    z = op.Where(low, ops.affine(x, -1, 1), x)
    raised, less = ops.affine(z, 1, RAISED), op.Reciprocal(z)
    for k in range(1, RAISED):
        less = op.Add(less, op.Reciprocal(ops.affine(z, 1, k)))
    inverse = op.Reciprocal(raised)
    powers = [-(2 * k + 1) * own for k, own in enumerate(STIRLING)]
    square = op.Mul(inverse, inverse)
    series = op.Sub(op.Mul(square, ops.polynomial(square, powers[::-1])), ops.scaled(inverse, 0.5))
    found = op.Sub(op.Add(op.Log(raised), series), less)
    cotangent = op.Div(_sine(ops, ops.affine(x, 1, 0.5)), _sine(ops, x))
    other = op.Sub(found, ops.scaled(cotangent, math.pi))
    pole = op.CastLike(op.Constant(value_float=math.nan), x)
    whole = op.And(low, op.Equal(x, op.Floor(x)))
    zero = op.Div(ops.number(-1.0), x)  # at 0 it is infinite, with the sign of 0 turned
    other = op.Where(whole, op.Where(op.Equal(x, ops.number(0.0)), zero, pole), other)
    return ops.back(op.Where(low, other, found))


def _sine(ops: _Ops, x: Any) -> Any:
    """sin πx, of what x has beyond the next even number, so that large arguments keep their digits."""
    op = ops.op
    beyond = op.Sub(x, ops.scaled(op.Floor(ops.affine(x, 0.5, 0.5)), 2))
    return op.Sin(ops.scaled(beyond, math.pi))


class _Ops:
    """ONNX's operators, on float64; results are of the type of some values."""

    def __init__(self, values: Any) -> None:
        from onnxscript import opset18

        self.op: Any = opset18  # its annotations hold for values in scripts, not for calls
        self._values = values

    def cast(self, value: Any) -> Any:
        return self.op.Cast(value, to=DOUBLE)

    def back(self, value: Any) -> Any:
        return self.op.CastLike(value, self._values)

    def number(self, own: float) -> Any:
        import numpy as np
        from onnx import numpy_helper

        return self.op.Constant(value=numpy_helper.from_array(np.array(own, dtype=np.float64)))

    def scaled(self, value: Any, scale: float) -> Any:
        return self.op.Mul(value, self.number(scale))

    def affine(self, value: Any, scale: float, shift: float) -> Any:
        return self.op.Add(value if scale == 1 else self.scaled(value, scale), self.number(shift))

    def polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        """By Horner's scheme, the highest power first."""
        found = self.number(coefficients[0])
        for own in coefficients[1:]:
            found = self.op.Add(self.op.Mul(found, x), self.number(own))
        return found
