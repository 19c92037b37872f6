"""Arithmetic with a constant or a parameter: diagonal affine maps. One line per op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules.affine import invert_by_autograd, invert_diagonal
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule

Gain = Callable[[Op], Tensor | float]


def constant(op: Op) -> Tensor | float:
    """The operand that does not depend on the model's input."""
    (name,) = {"self", "other"} - set(op.anchors)
    return op.parameters[name] if name in op.parameters else float(op.attributes[name])


def first(op: Op) -> bool:
    """Whether the unknown is the op's first operand."""
    return "self" in op.anchors


def alpha(op: Op) -> float:
    """The factor that torch applies to the operand that is added or subtracted."""
    return float(op.attributes["alpha"])


def reciprocal(op: Op) -> Tensor | float:
    if first(op) and not op.attributes.get("rounding_mode"):
        return 1 / constant(op)
    what = "rounds its quotient" if first(op) else "divides by what depends on the model's input"
    raise NoRuleError(
        f"node {op.name!r}, {op.key}: it {what}, which is not affine and has no rule; put it into a function of its own "
        "and give that function a rule with @fxinvert.inverse_rule"
    )


def scaled(key: str, gain: Gain) -> Rule:
    """A rule for y = gain · x + constant, entry by entry."""

    def invert(op: Op, target: Tensor) -> Inverse:
        anchor = op.anchor
        scale = torch.as_tensor(gain(op), dtype=anchor.dtype, device=anchor.device)
        if anchor.shape != target.shape:  # the constant has spread the anchor over more entries
            return invert_by_autograd(op, target)
        return invert_diagonal(op, target, scale)

    return Rule(key, invert, Kind.AFFINE)


def rules() -> list[Rule]:
    return [
        scaled("add", lambda op: 1 if first(op) else alpha(op)),
        scaled("sub", lambda op: 1 if first(op) else -alpha(op)),
        scaled("rsub", lambda op: -alpha(op) if first(op) else 1),
        scaled("mul", constant),
        scaled("div", reciprocal),
        scaled("neg", lambda op: -1),
    ]
