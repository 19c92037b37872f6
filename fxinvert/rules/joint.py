"""How a target is shared by several unknown inputs of one op: one line per op.

`jointly` moves all inputs at once, to the nearest of the tuples that come closest to the target; `held` asks, for each
input, what it should be while the others stay at their anchors. Both work entry by entry, in closed form but for the
product, whose multiplier is bisected. Inputs and target are `(B, …)`; where a closed form needs it, of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules import arithmetic
from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.op import Op

Values = tuple[Tensor, ...]
#: f(inputs), with the op's other arguments by name
Evaluate = Callable[..., Tensor]
#: (inputs, target) → inputs
Split = Callable[..., Values]

SCALED = {rule.key: rule for rule in arithmetic.rules()}
#: halvings of the interval of the product's multiplier
STEPS = 60


@dataclass(frozen=True)
class Joint:
    """One op of several unknown inputs: how it is evaluated, how a target is shared, and what each gets alone."""

    evaluate: Evaluate
    together: Split
    #: None: as the rule for arithmetic with a constant says
    alone: Split | None = None
    same_shape: bool = True


def jointly(
    key: str, anchors: Sequence[Tensor], target: Tensor, **attributes: Any
) -> tuple[Values, Certificate]:
    """The nearest tuple of inputs among those that come closest to the target.

    Args:
        key: the op.
        anchors: its unknown inputs, in order.
        target: of its output.
        **attributes: `alpha` of add and sub, `dim` of cat and stack.

    Raises:
        NoRuleError: the op has no such rule, or its inputs are spread over more entries.
    """
    joint, given = _joint(key, anchors, target), _working(anchors)
    found = _returned(joint.together(given, target.to(given[0].dtype), **attributes), anchors)
    values = tuple(_kept(joint, anchors, target, attributes, i, value) for i, value in enumerate(found))
    return values, _certificate(joint.evaluate(values, **attributes), target, values, anchors)


def held(key: str, anchors: Sequence[Tensor], target: Tensor, **attributes: Any) -> tuple[Inverse, ...]:
    """For each input, its nearest value among those that come closest to the target while the others are held.

    Args, Raises: as for `jointly`.
    """
    joint, given = _joint(key, anchors, target), _working(anchors)
    if joint.alone is None:
        return tuple(_by_rule(key, joint, anchors, target, attributes, i) for i in range(2))
    found = _returned(joint.alone(given, target.to(given[0].dtype), **attributes), anchors)
    answers = []
    for i, value in enumerate(found):
        value = _kept(joint, anchors, target, attributes, i, value)
        inputs = tuple(value if j == i else x for j, x in enumerate(anchors))
        reached = joint.evaluate(inputs, **attributes)
        answers.append(Inverse(value, _certificate(reached, target, (value,), (anchors[i],))))
    return tuple(answers)


def _kept(
    joint: Joint, anchors: Sequence[Tensor], target: Tensor, attributes: dict[str, Any], i: int, value: Tensor
) -> Tensor:
    """The i-th input's value, but its anchor wherever the target is what there was."""
    if not joint.same_shape:
        return value
    return torch.where(joint.evaluate(tuple(anchors), **attributes) == target, anchors[i], value)


def _by_rule(
    key: str, joint: Joint, anchors: Sequence[Tensor], target: Tensor, attributes: dict[str, Any], i: int
) -> Inverse:
    """The answer of the rule for arithmetic with a constant: the other input is one."""
    own, other = ("self", "other") if i == 0 else ("other", "self")

    def evaluate(value: Tensor) -> Tensor:
        return joint.evaluate((value, anchors[1]) if i == 0 else (anchors[0], value), **attributes)

    op = Op(
        key=key,
        name=key,
        anchors={own: anchors[i]},
        output=evaluate(anchors[i]),
        parameters={other: anchors[1 - i]},
        attributes={"alpha": 1, **attributes},
        evaluate=evaluate,
    )
    answer = SCALED[key].invert(op, target)
    assert isinstance(answer, Inverse)
    return answer


def _joint(key: str, anchors: Sequence[Tensor], target: Tensor) -> Joint:
    if key not in JOINT:
        raise NoRuleError(
            f"no rule splits the target of op {key!r} among several inputs; {', '.join(JOINT)} have one"
        )
    joint = JOINT[key]
    if joint.same_shape and any(x.shape != target.shape for x in anchors):
        shapes = ", ".join(str(tuple(x.shape)) for x in anchors)
        raise NoRuleError(
            f"op {key!r} spreads an input over more entries ({shapes} to {tuple(target.shape)}); expand it first"
        )
    return joint


def _working(anchors: Sequence[Tensor]) -> Values:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in anchors)


def _returned(found: Values, anchors: Sequence[Tensor]) -> Values:
    return tuple(value.to(x.dtype) for value, x in zip(found, anchors, strict=True))


def _certificate(reached: Tensor, target: Tensor, values: Values, anchors: Sequence[Tensor]) -> Certificate:
    residual = relative(reached - target, target)
    moved = [row_norms(value - x) for value, x in zip(values, anchors, strict=True)]
    every = bool((residual <= torch.finfo(target.dtype).eps ** 0.5).all())
    return Certificate(
        status=Status.NEAREST if every else Status.LEAST_SQUARES,
        residual=residual,
        distance=torch.stack(moved).square().sum(0).sqrt(),
        failed=torch.zeros_like(residual, dtype=torch.bool),
    )


# --- sums -----------------------------------------------------------------------------------------------


def _sum(sign: int) -> Joint:
    """y = a ± α b: what is missing goes to each by its share of the gain's square."""

    def evaluate(x: Values, alpha: float = 1) -> Tensor:
        return x[0] + sign * alpha * x[1]

    def together(x: Values, t: Tensor, alpha: float = 1) -> Values:
        gain, r = sign * alpha, t - evaluate(x, alpha)
        return x[0] + r / (1 + gain**2), x[1] + gain * r / (1 + gain**2)

    return Joint(evaluate, together)


# --- products -------------------------------------------------------------------------------------------


def _nearest_product(x: Values, t: Tensor) -> Values:
    """Nearest (a, b) with ab = t.

    With u = (a + b)/√2 and v = (a − b)/√2 it is u² − v² = 2t, and the multiplier λ gives u = u₀/(1 − λ),
    v = v₀/(1 + λ). On (−1, 1), where the nearest point has its λ, u² − v² increases. The coordinate that λ tells well
    is taken from it, the other from the equation, so that a start at u₀ = 0 or v₀ = 0 needs no case of its own.
    """
    u0, v0 = (x[0] + x[1]) / 2**0.5, (x[0] - x[1]) / 2**0.5
    low, high = torch.full_like(t, -1), torch.ones_like(t)
    for _ in range(STEPS):
        middle = (low + high) / 2
        less = (u0 / (1 - middle)).square() - (v0 / (1 + middle)).square() < 2 * t
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    multiplier = (low + high) / 2
    u, v = u0 / (1 - multiplier), v0 / (1 + multiplier)
    upper = (v.square() + 2 * t).clamp(min=0).sqrt() * torch.where(u0 < 0, -1, 1)
    lower = (u.square() - 2 * t).clamp(min=0).sqrt() * torch.where(v0 < 0, -1, 1)
    u, v = torch.where(multiplier < 0, u, upper), torch.where(multiplier < 0, lower, v)
    return (u + v) / 2**0.5, (u - v) / 2**0.5


def _nearest_quotient(x: Values, t: Tensor) -> Values:
    """Nearest (a, b) with a = t b: the projection onto a line; at its zero, where a/b is nothing, the anchors stay."""
    b = (x[0] * t + x[1]) / (1 + t.square())
    return torch.where(b == 0, x[0], t * b), torch.where(b == 0, x[1], b)


def _quotients(x: Values, t: Tensor) -> Values:
    divisor = torch.where((t == 0) | (x[0] == 0), x[1], x[0] / torch.where(t == 0, 1, t))
    return x[0] + (t - x[0] / x[1]) * x[1], divisor


# --- extremes -------------------------------------------------------------------------------------------


def _nearest_maximum(x: Values, t: Tensor) -> Values:
    """What is above comes down; where both are below, the larger comes up."""
    first, below = x[0] >= x[1], torch.maximum(*x) < t
    a, b = (torch.minimum(value, t) for value in x)
    return torch.where(below & first, t, a), torch.where(below & ~first, t, b)


def _maxima(x: Values, t: Tensor) -> Values:
    """What the other input does not allow is approached: it is the smallest that the maximum can be."""
    a, b = x
    return torch.where(b < t, t, torch.minimum(a, b)), torch.where(a < t, t, torch.minimum(a, b))


def _mirrored(split: Split) -> Split:
    """min x = −max −x."""
    return lambda x, t: tuple(-value for value in split(tuple(-v for v in x), -t))


# --- joins ----------------------------------------------------------------------------------------------


def _parts(x: Values, t: Tensor, dim: int = 0) -> Values:
    parts: Values = torch.split(t, [value.shape[dim] for value in x], dim)
    return parts


def _layers(x: Values, t: Tensor, dim: int = 0) -> Values:
    return t.unbind(dim)


JOINT: dict[str, Joint] = {
    "add": _sum(1),
    "sub": _sum(-1),
    "mul": Joint(lambda x: x[0] * x[1], _nearest_product),
    "div": Joint(lambda x: x[0] / x[1], _nearest_quotient, _quotients),
    "maximum": Joint(lambda x: torch.maximum(*x), _nearest_maximum, _maxima),
    "minimum": Joint(lambda x: torch.minimum(*x), _mirrored(_nearest_maximum), _mirrored(_maxima)),
    "cat": Joint(lambda x, dim=0: torch.cat(x, dim), _parts, _parts, same_shape=False),
    "stack": Joint(lambda x, dim=0: torch.stack(x, dim), _layers, _layers, same_shape=False),
}
