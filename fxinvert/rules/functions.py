"""Elementary functions, applied entry by entry: one line per op, its monotone branches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxinvert.rules.branches import Number, Scalar, falling, flat, log, periodic, rising, same
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.elementwise import (
    INF,
    Branches,
    clipped,
    elementwise,
    even,
    everywhere,
    odd,
)
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule

REALS = (-INF, INF)


def root(exponent: float) -> Scalar:
    """Inverse of x ↦ x^exponent for x ≥ 0; the roots that processors have keep all digits."""
    special: dict[float, Scalar] = {
        2: torch.sqrt,
        1: same,
        0.5: torch.square,
        -1: torch.reciprocal,
        -0.5: lambda y: y.square().reciprocal(),
    }
    return special.get(exponent, lambda y: y ** (1 / exponent))


def power(exponent: float) -> Branches:
    """x^exponent: of every number for whole exponents (a pole at 0 for negative ones), of x ≥ 0 for others."""
    inverse = root(exponent)
    if exponent == 0:
        return (flat(-INF, INF, 1),)
    above = (rising if exponent > 0 else falling)(0, INF, (0, INF), inverse)
    if exponent % 1:
        return (above,)
    if exponent % 2 == 0:
        return (falling if exponent > 0 else rising)(-INF, 0, (0, INF), lambda y: -inverse(y)), above
    if exponent > 0:
        return everywhere(REALS, same) if exponent == 1 else odd(inverse)
    return falling(-INF, 0, (-INF, 0), lambda y: -inverse(-y)), above


def exponential(base: float) -> Branches:
    """base^x, for a base > 0."""
    if base == 1:
        return (flat(-INF, INF, 1),)
    return ((rising if base > 1 else falling)(-INF, INF, (0, INF), lambda y: log(y) / math.log(base)),)


def logarithm(inverse: Scalar, pole: float = 0) -> Branches:
    """An increasing function of x > pole, onto every number."""
    return (rising(pole, INF, REALS, inverse),)


def between(low: float, high: float, image: tuple[float, float], inverse: Scalar) -> Branches:
    """An increasing function on an interval."""
    return (rising(low, high, image, inverse),)


def logit_clipped(eps: float | None) -> Branches:
    """log(x / (1 − x)), x first clipped to [eps, 1 − eps] where that is given."""
    if eps is None:
        return between(0, 1, REALS, torch.sigmoid)
    end = math.log((1 - eps) / eps)
    return (
        flat(-INF, eps, -end, rounded=True),
        rising(eps, 1 - eps, (-end, end), torch.sigmoid),
        flat(1 - eps, INF, end, rounded=True),
    )


def wave(inverse: Scalar, mirrored: Scalar) -> Branches:
    """A function of period 2π onto [−1, 1]; every value is reached twice in a period."""
    return periodic(2 * math.pi, (-1, 1), inverse), periodic(2 * math.pi, (-1, 1), mirrored)


def erfc_inverse(y: Tensor) -> Tensor:
    """By the normal quantile, which keeps the digits of small values."""
    quantile: Tensor = torch.special.ndtri(y / 2)
    return quantile * -math.sqrt(0.5)


def bounds(a: Mapping[str, Any]) -> tuple[Number, Number]:
    """Ends that are given, by number or tensor."""
    low, high = (a[name] for name in ("min", "max"))
    return -INF if low is None else low, INF if high is None else high


def operand(a: Mapping[str, Any]) -> Tensor:
    """The constant that `maximum` and its kin compare with: whichever operand is not the unknown."""
    constant: Tensor = a["other"] if "other" in a else a["self"]
    return constant


def pow_(op: Op, target: Tensor) -> Inverse:
    """x^number and number^x; where the number is a tensor of several, there are no branches to name."""
    name = "exponent" if "self" in op.anchors else "self"
    number = op.attributes.get(name, op.parameters.get(name))
    several = isinstance(number, Tensor) and number.numel() != 1
    if several or (name == "self" and float(number) <= 0):
        return invert_matrix_free(op, target)
    branches = (power if name == "exponent" else exponential)(float(number))
    return elementwise("pow", lambda a: branches).invert(op, target)  # type: ignore[return-value]


def line(key: str, branches: Callable[[], Branches]) -> Rule:
    """A rule for a function without attributes."""
    return elementwise(key, lambda a: branches())


def rules() -> list[Rule]:
    return [
        line("exp", lambda: everywhere((0, INF), log)),
        line("exp2", lambda: everywhere((0, INF), torch.log2)),
        line("expm1", lambda: everywhere((-1, INF), torch.log1p)),
        line("log", lambda: logarithm(torch.exp)),
        line("log2", lambda: logarithm(torch.exp2)),
        line("log10", lambda: logarithm(lambda y: 10**y)),
        line("log1p", lambda: logarithm(torch.expm1, pole=-1)),
        elementwise("logit", lambda a: logit_clipped(a["eps"])),
        Rule("pow", pow_, Kind.ELEMENTWISE),
        line("square", lambda: power(2)),
        line("sqrt", lambda: power(0.5)),
        line("rsqrt", lambda: power(-0.5)),
        line("reciprocal", lambda: power(-1)),
        line("abs", lambda: even(same)),
        line("sin", lambda: wave(torch.asin, lambda y: math.pi - y.asin())),
        line("cos", lambda: wave(torch.acos, lambda y: -y.acos())),
        line("asin", lambda: between(-1, 1, (-math.pi / 2, math.pi / 2), torch.sin)),
        line("acos", lambda: (falling(-1, 1, (0, math.pi), torch.cos),)),
        line("atan", lambda: everywhere((-math.pi / 2, math.pi / 2), torch.tan)),
        line("sinh", lambda: everywhere(REALS, torch.asinh)),
        line("cosh", lambda: even(torch.acosh, least=1)),
        line("asinh", lambda: everywhere(REALS, torch.sinh)),
        line("acosh", lambda: between(1, INF, (0, INF), torch.cosh)),
        line("atanh", lambda: between(-1, 1, REALS, torch.tanh)),
        line("erf", lambda: everywhere((-1, 1), torch.erfinv)),
        line("erfc", lambda: (falling(-INF, INF, (0, 2), erfc_inverse),)),
        line("erfinv", lambda: between(-1, 1, REALS, torch.erf)),
        elementwise("clamp", lambda a: clipped(*bounds(a))),
        elementwise("clip", lambda a: clipped(*bounds(a))),
        elementwise("clamp_min", lambda a: clipped(a["min"], INF)),
        elementwise("clamp_max", lambda a: clipped(-INF, a["max"])),
    ]
