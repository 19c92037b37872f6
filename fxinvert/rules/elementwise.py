"""Activations, applied entry by entry: one line per op, its monotone branches.

A line gives the branches as a function of the op's attributes; `branches.py` does the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.linalg.memory import waits
from fxinvert.rules.branches import Branch, Number, Scalar, falling, flat, holds, log, rising, same, writing
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.entrywise import invert_branches
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.op import Op
from fxinvert.rules.rational import Rational
from fxinvert.rules.rule import Kind, Rule

INF = math.inf
#: a slope that makes of any number but zero one beyond all bounds
STEEP = 2.0**100
Branches = tuple[Branch, ...]


def logit(y: Tensor) -> Tensor:
    """log(y / (1 − y)): torch's own is not vectorized."""
    return log(torch.div(y, 1 - y))


def divided(scale: float) -> Scalar:
    """Inverse of x ↦ scale · x."""
    return lambda y: y / scale


@functools.cache
def hinge(slope: float) -> Branches:
    """x for x ≥ 0, slope · x below: ReLU, leaky ReLU and PReLU's scalar form, for a slope of any sign."""
    if slope == 0:
        return flat(-INF, 0, 0), rising(0, INF, (0, INF), same)
    if slope > 0:
        return everywhere((-INF, INF), functools.partial(torch._C._nn.leaky_relu, negative_slope=1 / slope))
    return falling(-INF, 0, (0, INF), divided(slope)), rising(0, INF, (0, INF), same)


def everywhere(image: tuple[float, float], inverse: Scalar) -> Branches:
    """An increasing function of every real number."""
    return (rising(-INF, INF, image, inverse),)


def even(root: Scalar, least: Number = 0) -> Branches:
    """A function of |x| that increases from `least`."""
    return falling(-INF, 0, (least, INF), lambda y: -root(y)), rising(0, INF, (least, INF), root)


def odd(inverse: Scalar) -> Branches:
    """An increasing function with f(−x) = −f(x), from its inverse for y ≥ 0."""
    return everywhere((-INF, INF), lambda y: inverse(y.abs()).mul_(y.sign()))


def clipped(low: Number, high: Number) -> Branches:
    """x, clipped to [low, high]; the upper end counts where they are in the wrong order, as in torch."""
    if isinstance(low, Tensor):
        low = torch.minimum(low, torch.as_tensor(high).to(low))
    elif not isinstance(high, Tensor):
        low = min(low, high)
    elif low > -INF:
        low = high.clamp(max=low)
    below = () if isinstance(low, float) and low == -INF else (flat(-INF, low, low),)
    above = () if isinstance(high, float) and high == INF else (flat(high, INF, high),)
    return (*below, rising(low, high, (low, high), same), *above)


def exponential_unit(alpha: float, scale: float = 1.0, rate: float = 1.0) -> Branches:
    """scale · x for x ≥ 0, scale · alpha · (exp(rate · x) − 1) below: ELU, SELU, CELU, for parameters of any sign."""
    factor = scale * alpha
    end = -factor if rate > 0 else factor * INF  # the value at −∞

    def below(y: Tensor) -> Tensor:
        return (y / factor).log1p_().div_(rate)

    above = rising(0, INF, (0, INF), divided(scale))
    if factor == 0:
        return flat(-INF, 0, 0), above
    if end > 0:
        return falling(-INF, 0, (0, end), below), above
    # either part is zero where the other is not
    return everywhere((end, INF), lambda y: below(y.clamp(max=0)).add_(y.clamp(min=0), alpha=1 / scale))


def valley(function: Scalar, bottom: float, far: float, straight: float) -> Branches:
    """Functions that fall from 0 to a lowest point and rise from there like x: GELU, SiLU, Mish.

    `bottom` is where the lowest point lies, `far` an x below which the function is zero for all purposes, `straight` one
    beyond which it is x to the digits of a fit.
    """
    least, edge, end = function(torch.tensor([bottom, far, straight], dtype=torch.float64)).tolist()
    left = Rational(
        function,
        (bottom, far),
        lambda y: log(y.neg()).sub_(math.log(-least)).abs_().sqrt_(),
        lambda s: least * torch.exp(-s * s),
        constant=bottom,
        adds=False,
    )
    right = Rational(
        function,
        (bottom, straight),
        lambda y: y.clamp(max=end).sub_(least).sqrt_(),
        lambda s: least + s * s,
        constant=bottom - least,
        adds=True,
    )
    sides = falling(far, bottom, (least, edge), left), rising(bottom, INF, (least, INF), right)
    return tuple(replace(side, keeps=True, costly=True) for side in sides)


@functools.cache
def gelu(approximate: str) -> Branches:
    if approximate == "none":
        return valley(lambda x: x * torch.erfc(x * -math.sqrt(0.5)) / 2, -0.7517915246935645, -11, 6)
    rate = math.sqrt(8 / math.pi)
    return valley(lambda x: x * torch.sigmoid(rate * (x + 0.044715 * x**3)), -0.7524614220710162, -8, 6)


@functools.cache
def silu() -> Branches:
    return valley(F.silu, -1.2784645427610738, -60, 20)


@functools.cache
def mish() -> Branches:
    return valley(F.mish, -1.1924312145154954, -60, 11)


@functools.cache
def tanhshrink() -> Branches:
    """x − tanh x: odd, like x³/3 at zero and like x − 1 far from it."""
    return odd(
        Rational(
            lambda x: x - x.tanh(),
            (0, 10),
            lambda y: y.clamp(max=9) ** (1 / 3),
            lambda s: s**3,
            constant=0,
            adds=True,
        )
    )


def hardsigmoid() -> Branches:
    """x / 6 + 1/2, clipped to [0, 1]."""
    line = rising(-3, 3, (0, 1), functools.partial(torch.add, torch.tensor(-3.0), alpha=6))
    return flat(-INF, -3, 0), replace(line, keeps=True), flat(3, INF, 1)


def hardswish() -> Branches:
    """x · clip(x + 3, 0, 6) / 6: a parabola between −3 and 3 with its lowest point −3/8 at −3/2, 0 below it and x above.

    A value up to 0 has a pre-image on either side of the lowest point; at −3 that of 0 is the nearest where the function is 0.
    """
    square = torch.tensor(2.25)

    @writing
    def nearest(y: Tensor, anchor: Tensor, out: Tensor | None = None) -> Tensor:
        root = y.clamp(max=3)  # no value is below the lowest point
        root = torch.add(square, root, alpha=6, out=None if waits(y) else root).sqrt_()
        moved = y - 1.5
        left = torch.maximum(anchor, moved, out=out)
        left = holds(torch.le, left, -1.5, left).to(root)
        return torch.addcmul(root, root, left, value=-2, out=out).add_(moved.clamp_(min=1.5)).sub_(3)

    return (Branch(-INF, INF, -0.375, INF, nearest, rises=True),)


def softplus(beta: float, threshold: float) -> Branches:
    """log(1 + exp(βx)) / β, linear beyond the threshold."""

    def inverse(y: Tensor) -> Tensor:
        scaled = y if beta == 1 else beta * y
        # log(expm1(z)) = z + log(-expm1(-z)) does not overflow
        curved = log(torch.neg(scaled).expm1_().neg_()).add_(scaled)
        if beta != 1:
            curved.div_(beta)
        if not waits(y) and y.numel() and float(scaled.amax()) <= threshold:
            return curved
        return torch.lerp(curved, y, torch.gt(scaled, threshold, out=torch.empty_like(y)))

    return everywhere((0, INF), inverse)


def hard_shrunk(lambd: float) -> Branches:
    """0 for |x| ≤ λ, x beyond."""
    above = replace(rising(lambd, INF, (lambd, INF), same), open_low=lambd > 0)
    below = replace(rising(-INF, -lambd, (-INF, -lambd), same), open_high=lambd > 0)
    return below, flat(-lambd, lambd, 0), above


def soft_shrunk(lambd: float) -> Branches:
    """x, brought nearer to zero by λ, and 0 for |x| ≤ λ: what is farther from zero than rounding is λ off."""

    @writing
    def nearest(y: Tensor, anchor: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.add(anchor, y, alpha=STEEP, out=out).clamp_(-lambd, lambd).add_(y)

    return (Branch(-INF, INF, -INF, INF, nearest, rises=True),)


def threshold(limit: float, value: float) -> Branches:
    """x where it is above a limit, a value elsewhere."""
    return flat(-INF, limit, value), replace(rising(limit, INF, (limit, INF), same), open_low=limit != value)


def per_channel(slope: Tensor) -> Branches:
    """x for x ≥ 0, slope · x below, for slopes of any sign that broadcast."""
    if bool((slope > 0).all()):
        return everywhere((-INF, INF), lambda y: torch.prelu(y, (1 / slope).flatten().to(y.dtype)))
    zero = torch.zeros_like(slope)
    least, most = torch.where(slope > 0, -INF, zero), torch.where(slope < 0, INF, zero)

    def below(y: Tensor, anchor: Tensor) -> Tensor:
        return torch.where(slope == 0, anchor, y / slope)

    return Branch(-INF, 0, least, most, below), rising(0, INF, (0, INF), same)


def prelu(op: Op) -> Branches:
    """The slope is one number, or one for every channel, on the second axis."""
    slope = op.parameters["weight"]
    if slope.numel() == 1:
        return hinge(slope.item())
    return per_channel(slope.reshape(-1, *[1] * (op.anchor.dim() - 2)))


def elementwise(key: str, branches: Callable[[Mapping[str, Any]], Branches]) -> Rule:
    """A rule from the branches of a scalar function, given as a function of the op's attributes and parameters."""

    @functools.lru_cache(maxsize=64)
    def known(attributes: tuple[tuple[str, Any], ...]) -> Branches:
        return branches(dict(attributes))

    def of(op: Op) -> Branches:
        plain = all(isinstance(value, int | float | str | None) for value in op.attributes.values())
        if plain and not op.parameters:
            return known(tuple(op.attributes.items()))
        return branches({**op.attributes, **op.parameters})

    return with_op(key, of)


def with_op(key: str, branches: Callable[[Op], Branches]) -> Rule:
    """The same, where the branches depend on the op's shapes."""

    def invert(op: Op, target: Tensor) -> Inverse:
        if op.anchor.shape != target.shape:  # a constant has spread the anchor over more entries
            return invert_matrix_free(op, target)
        return invert_branches(op, target, branches(op))

    return Rule(key, invert, Kind.ELEMENTWISE, branches=branches)


def rules() -> list[Rule]:
    return [
        elementwise("relu", lambda a: hinge(0.0)),
        elementwise("leaky_relu", lambda a: hinge(a["negative_slope"])),
        elementwise("rrelu", lambda a: hinge((a["lower"] + a["upper"]) / 2)),
        with_op("prelu", prelu),
        elementwise("threshold", lambda a: threshold(a["threshold"], a["value"])),
        elementwise("_threshold", lambda a: threshold(a["threshold"], a["value"])),
        elementwise("hardtanh", lambda a: clipped(a["min_val"], a["max_val"])),
        elementwise("hardshrink", lambda a: hard_shrunk(a["lambd"])),
        elementwise("softshrink", lambda a: soft_shrunk(a["lambd"])),
        elementwise("tanhshrink", lambda a: tanhshrink()),
        elementwise("elu", lambda a: exponential_unit(a["alpha"], a["scale"], a["input_scale"])),
        elementwise("celu", lambda a: exponential_unit(a["alpha"], 1.0, 1 / a["alpha"])),
        elementwise("selu", lambda a: exponential_unit(1.6732632423543772, 1.0507009873554805)),
        elementwise("tanh", lambda a: everywhere((-1, 1), torch.atanh)),
        elementwise("sigmoid", lambda a: everywhere((0, 1), logit)),
        elementwise("log_sigmoid", lambda a: everywhere((-INF, 0), lambda y: y - log(-torch.expm1(y)))),
        elementwise("softplus", lambda a: softplus(a["beta"], a["threshold"])),
        elementwise("softsign", lambda a: everywhere((-1, 1), lambda y: y / (1 - y.abs()))),
        elementwise("hardsigmoid", lambda a: hardsigmoid()),
        elementwise("hardswish", lambda a: hardswish()),
        elementwise("gelu", lambda a: gelu(a["approximate"])),
        elementwise("silu", lambda a: silu()),
        elementwise("mish", lambda a: mish()),
    ]
