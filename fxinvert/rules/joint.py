"""How a target is shared by several unknown inputs of one op: one line per op.

`jointly` moves all inputs at once, to the nearest of the tuples that come closest to the target; `held` asks the op's
own rule, for each input, what it should be while the others stay at their anchors.

Inputs of one shape are shared in closed form, entry by entry (the product's multiplier is bisected), sums and choices of
any shapes too. A matrix product, and a product, quotient or extreme whose inputs are spread over more entries, is solved
by Gauss–Newton in all its inputs together, from the anchors; the certificate tells how far that came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.op import Op
from fxinvert.rules.registry import default_rules
from fxinvert.rules.shares import (
    Split,
    Values,
    between,
    chosen,
    interpolated,
    layers,
    mirrored,
    nearest_maximum,
    nearest_product,
    nearest_quotient,
    parts,
    spread_evenly,
)

#: f(inputs), with the op's other arguments by name
Evaluate = Callable[..., Tensor]


@dataclass(frozen=True)
class Joint:
    """One op of several unknown inputs.

    Attributes:
        evaluate: the op.
        names: of its inputs; of a list, the list's name.
        together: how a target is shared in closed form; None where it is solved for.
        how: the same in words.
        any_shape: whether the closed form holds for inputs that are spread over more entries.
        entrywise: whether an entry stays as it is where its target is what there was.
        needs: arguments without which there is no closed form.
        defaults: the op's other arguments.
    """

    evaluate: Evaluate
    names: tuple[str, ...] | str
    together: Split | None
    how: str
    any_shape: bool = False
    entrywise: bool = True
    needs: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()

    def named(self, index: int) -> str:
        """The name of an input."""
        return f"{self.names}_{index}" if isinstance(self.names, str) else self.names[index]


def jointly(
    key: str, anchors: Sequence[Tensor], target: Tensor, **attributes: Any
) -> tuple[Values, Certificate]:
    """The nearest tuple of inputs among those that come closest to the target.

    Args:
        key: the op.
        anchors: its unknown inputs, in order.
        target: of its output.
        **attributes: its other arguments: `alpha` of add and sub, `dim` of cat and stack, `condition` of where, `weight`
            of lerp.

    Raises:
        NoRuleError: the op has no such rule.
    """
    joint, given = _joint(key), _working(anchors)
    spread = any(x.shape != target.shape for x in anchors)
    known = all(name in attributes for name in joint.needs)
    if joint.together is None or not known or (spread and not joint.any_shape):
        return _solved(key, joint, anchors, target, attributes)
    found = _returned(joint.together(given, target.to(given[0].dtype), **attributes), anchors)
    if joint.entrywise and not spread:
        stays = joint.evaluate(tuple(anchors), **attributes) == target
        found = tuple(torch.where(stays, x, value) for x, value in zip(anchors, found, strict=True))
    return found, _certificate(joint.evaluate(found, **attributes), target, found, anchors)


def held(key: str, anchors: Sequence[Tensor], target: Tensor, **attributes: Any) -> tuple[Inverse, ...]:
    """For each input, its nearest value among those that come closest to the target while the others are held.

    Args, Raises: as for `jointly`.
    """
    joint = _joint(key)
    rule = default_rules().require(key, "held operands")
    answers = []
    for i, anchor in enumerate(anchors):
        given = {joint.named(j): x for j, x in enumerate(anchors) if j != i}
        given |= {name: value for name, value in attributes.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in attributes.items() if name not in given}

        def evaluate(value: Tensor, i: int = i) -> Tensor:
            return joint.evaluate((*anchors[:i], value, *anchors[i + 1 :]), **attributes)

        op = Op(
            key=key,
            name=key,
            anchors={joint.named(i): anchor},
            output=evaluate(anchor),
            parameters=given,
            attributes={**dict(joint.defaults), **plain},
            evaluate=evaluate,
        )
        answer = rule.invert(op, target)
        assert isinstance(answer, Inverse)
        answers.append(answer)
    return tuple(answers)


def _joint(key: str) -> Joint:
    if key not in JOINT:
        raise NoRuleError(
            f"no rule splits the target of op {key!r} among several inputs; {', '.join(JOINT)} have one"
        )
    return JOINT[key]


def _solved(
    key: str, joint: Joint, anchors: Sequence[Tensor], target: Tensor, attributes: dict[str, Any]
) -> tuple[Values, Certificate]:
    """All inputs as one, by Gauss–Newton."""
    sizes = [x.shape[1:].numel() for x in anchors]

    def unpacked(packed: Tensor) -> Values:
        parts = torch.split(packed, sizes, 1)
        return tuple(part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, anchors, strict=True))

    def evaluate(packed: Tensor) -> Tensor:
        return joint.evaluate(unpacked(packed), **attributes)

    packed = torch.cat([x.reshape(len(x), size) for x, size in zip(anchors, sizes, strict=True)], 1)
    found = invert_matrix_free(Op(key, key, {"inputs": packed}, evaluate(packed), {}, {}, evaluate), target)
    return unpacked(found.target), found.certificate


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


def _sum(sign: int) -> Joint:
    """y = a ± α b: what is missing goes to each by its share of the gain's square."""

    def evaluate(x: Values, alpha: float = 1) -> Tensor:
        return x[0] + sign * alpha * x[1]

    def together(x: Values, t: Tensor, alpha: float = 1) -> Values:
        gain, r = sign * alpha, t - evaluate(x, alpha)
        if x[0].shape == x[1].shape:
            return x[0] + r / (1 + gain**2), x[1] + gain * r / (1 + gain**2)
        d, e = spread_evenly(x, r, gain)
        return x[0] + d, x[1] + e

    how = "each by its share of the squared gain, in closed form, for inputs of any shapes"
    return Joint(evaluate, ("self", "other"), together, how, any_shape=True, defaults=(("alpha", 1),))


_PAIR = ("self", "other")
_ENTRIES = "in closed form, entry by entry; by Gauss–Newton where an input is spread over more entries"
JOINT: dict[str, Joint] = {
    "add": _sum(1),
    "sub": _sum(-1),
    "mul": Joint(lambda x: x[0] * x[1], _PAIR, nearest_product, f"nearest point of a hyperbola, {_ENTRIES}"),
    "div": Joint(lambda x: x[0] / x[1], _PAIR, nearest_quotient, f"nearest point of a line, {_ENTRIES}"),
    "maximum": Joint(
        lambda x: torch.maximum(*x), _PAIR, nearest_maximum, f"the larger of two moves, {_ENTRIES}"
    ),
    "minimum": Joint(
        lambda x: torch.minimum(*x),
        _PAIR,
        mirrored(nearest_maximum),
        f"the smaller of two moves, {_ENTRIES}",
    ),
    "lerp": Joint(
        interpolated,
        ("self", "end", "weight"),
        between,
        f"each by its share of the squared gain, {_ENTRIES} or the weight is unknown too",
        needs=("weight",),
    ),
    "where": Joint(
        lambda x, condition: torch.where(condition, x[0], x[1]),
        _PAIR,
        chosen,
        "each takes the places that are its own",
        any_shape=True,
    ),
    "matmul": Joint(lambda x: torch.matmul(*x), _PAIR, None, "by Gauss–Newton in both inputs together"),
    "cat": Joint(
        lambda x, dim=0: torch.cat(x, dim),
        "tensors",
        parts,
        "each takes its own part",
        any_shape=True,
        entrywise=False,
    ),
    "stack": Joint(
        lambda x, dim=0: torch.stack(x, dim),
        "tensors",
        layers,
        "each takes its own layer",
        any_shape=True,
        entrywise=False,
    ),
}
