"""Scalar functions, applied entry by entry: one line per op, its monotone branches.

A line gives the branches as a function of the op's attributes; `branches.py` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.rules.branches import Branch, Scalar, falling, flat, invert_branches, numeric, rising
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule

INF = math.inf
Branches = tuple[Branch, ...]


def same(y: Tensor) -> Tensor:
    return y


def divided(scale: float) -> Scalar:
    """Inverse of x ↦ scale · x."""
    return lambda y: y / scale


def hinge(slope: float) -> Branches:
    """x for x ≥ 0, slope · x below: ReLU, leaky ReLU and PReLU's scalar form, for a slope of any sign."""
    if slope == 0:
        return flat(-INF, 0, 0), rising(0, INF, (0, INF), same)
    if slope > 0:
        return rising(-INF, 0, (-INF, 0), divided(slope)), rising(0, INF, (0, INF), same)
    return falling(-INF, 0, (0, INF), divided(slope)), rising(0, INF, (0, INF), same)


def everywhere(image: tuple[float, float], inverse: Scalar) -> Branches:
    """An increasing function of every real number."""
    return (rising(-INF, INF, image, inverse),)


def even(root: Scalar) -> Branches:
    """A function of |x| that increases from 0."""
    return falling(-INF, 0, (0, INF), lambda y: -root(y)), rising(0, INF, (0, INF), root)


def clipped(low: float, high: float) -> Branches:
    """x, clipped to [low, high]."""
    return flat(-INF, low, low), rising(low, high, (low, high), same), flat(high, INF, high)


def exponential_unit(alpha: float, scale: float = 1.0, rate: float = 1.0) -> Branches:
    """scale · x for x ≥ 0, scale · alpha · (exp(rate · x) − 1) below: ELU, SELU, CELU, for parameters of any sign."""
    factor = scale * alpha
    end = -factor if rate > 0 else factor * INF  # the value at −∞

    def below(y: Tensor) -> Tensor:
        return torch.log1p(y / factor) / rate

    above = rising(0, INF, (0, INF), divided(scale))
    if factor == 0:
        return flat(-INF, 0, 0), above
    return (rising(-INF, 0, (end, 0), below) if end < 0 else falling(-INF, 0, (0, end), below)), above


def valley(function: Scalar, bottom: float, far: float) -> Branches:
    """Functions that fall from 0 to a lowest point and rise from there like x: GELU, SiLU, Mish.

    `bottom` is where the lowest point lies, `far` an x below which the function is zero for all purposes.
    """
    at = torch.tensor([far, bottom], dtype=torch.float64)
    edge, least = function(at).tolist()

    def left(target: Tensor) -> tuple[Tensor, Tensor]:
        # what is as near to zero as makes no difference belongs to the far end; nothing has to be searched
        return torch.full_like(target, far), torch.where(target >= 2 * edge, far, bottom)

    def right(target: Tensor) -> tuple[Tensor, Tensor]:
        # the pre-image of a negative target is negative; that of another one exceeds it, by 0.31 at most
        return torch.where(target < 0, bottom, target), target.clamp(min=0) + 0.32

    return (
        falling(far, bottom, (least, edge), numeric(function, left, increasing=False)),
        rising(bottom, INF, (least, INF), numeric(function, right, increasing=True)),
    )


def hardsigmoid() -> Branches:
    """x / 6 + 1/2, clipped to [0, 1]."""
    return flat(-INF, -3, 0), rising(-3, 3, (0, 1), lambda y: 6 * y - 3), flat(3, INF, 1)


def hardswish() -> Branches:
    """x · clip(x + 3, 0, 6) / 6, a parabola between −3 and 3 with its lowest point −3/8 at −3/2."""

    def root(y: Tensor) -> Tensor:
        return torch.sqrt(torch.clamp(2.25 + 6 * y, min=0))

    return (
        flat(-INF, -3, 0),
        falling(-3, -1.5, (-0.375, 0), lambda y: -1.5 - root(y)),
        rising(-1.5, 3, (-0.375, 3), lambda y: -1.5 + root(y)),
        rising(3, INF, (3, INF), same),
    )


def softplus(beta: float, threshold: float) -> Branches:
    """log(1 + exp(βx)) / β, linear beyond the threshold."""

    def inverse(y: Tensor) -> Tensor:
        scaled = beta * y
        # log(expm1(z)) = z + log(-expm1(-z)) does not overflow
        return torch.where(scaled > threshold, y, (scaled + torch.log(-torch.expm1(-scaled))) / beta)

    return everywhere((0, INF), inverse)


def gelu(approximate: str) -> Branches:
    bottom = -0.7517915246935645 if approximate == "none" else -0.7524614220710162
    return valley(lambda x: F.gelu(x, approximate=approximate), bottom, -12)


def elementwise(key: str, branches: Callable[[Mapping[str, Any]], Branches]) -> Rule:
    """A rule from the branches of a scalar function, given as a function of the op's attributes."""

    def invert(op: Op, target: Tensor) -> Inverse:
        return invert_branches(op, target, branches(op.attributes))

    return Rule(key, invert, Kind.ELEMENTWISE)


def rules() -> list[Rule]:
    return [
        elementwise("relu", lambda a: hinge(0.0)),
        elementwise("leaky_relu", lambda a: hinge(a["negative_slope"])),
        elementwise("hardtanh", lambda a: clipped(a["min_val"], a["max_val"])),
        elementwise("elu", lambda a: exponential_unit(a["alpha"], a["scale"], a["input_scale"])),
        elementwise("celu", lambda a: exponential_unit(a["alpha"], 1.0, 1 / a["alpha"])),
        elementwise("selu", lambda a: exponential_unit(1.6732632423543772, 1.0507009873554805)),
        elementwise("tanh", lambda a: everywhere((-1, 1), torch.atanh)),
        elementwise("sigmoid", lambda a: everywhere((0, 1), torch.logit)),
        elementwise("log_sigmoid", lambda a: everywhere((-INF, 0), lambda y: y - torch.log(-torch.expm1(y)))),
        elementwise("softplus", lambda a: softplus(a["beta"], a["threshold"])),
        elementwise("softsign", lambda a: everywhere((-1, 1), lambda y: y / (1 - y.abs()))),
        elementwise("hardsigmoid", lambda a: hardsigmoid()),
        elementwise("hardswish", lambda a: hardswish()),
        elementwise("gelu", lambda a: gelu(a["approximate"])),
        elementwise("silu", lambda a: valley(F.silu, -1.2784645427610738, -60)),
        elementwise("mish", lambda a: valley(F.mish, -1.1924312145315, -60)),
        elementwise("exp", lambda a: everywhere((0, INF), torch.log)),
        elementwise("square", lambda a: even(torch.sqrt)),
        elementwise("abs", lambda a: even(same)),
    ]
