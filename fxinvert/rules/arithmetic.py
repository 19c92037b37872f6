"""Arithmetic with a constant or a parameter: diagonal affine maps. One line per op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.linalg import solve_diagonal
from fxinvert.rules.affine import invert_by_autograd, invert_diagonal, moved, shortfall
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule

Gain = Callable[[Op], Tensor | float]


def given(op: Op, name: str) -> Tensor | float:
    """An operand that does not depend on the model's input: a tensor or a number."""
    return op.parameters[name] if name in op.parameters else float(op.attributes[name])


def constant(op: Op) -> Tensor | float:
    """The other operand of two."""
    (name,) = {"self", "other"} - set(op.anchors)
    return given(op, name)


def first(op: Op) -> bool:
    """Whether the unknown is the op's first operand."""
    return "self" in op.anchors


def alpha(op: Op) -> float:
    """The factor that torch applies to the operand that is added or subtracted."""
    return float(op.attributes["alpha"])


def factor(op: Op) -> Tensor | float:
    """Of addcmul, self + value · tensor1 · tensor2."""
    value = float(op.attributes["value"])
    return 1 if first(op) else value * given(op, "tensor2" if "tensor1" in op.anchors else "tensor1")


def share(op: Op) -> Tensor | float:
    """Of lerp, self + weight · (end − self)."""
    if "weight" in op.anchors:
        return given(op, "end") - given(op, "self")
    return 1 - given(op, "weight") if first(op) else given(op, "weight")


def invert_scaled(op: Op, target: Tensor, scale: Tensor) -> Inverse:
    """Nearest x for y = scale ⊙ x + constant, where scale or constant may spread x over more entries.

    The copies of an entry, each with a scale s of its own, are one equation, ‖s‖ x = ⟨s, r⟩ / ‖s‖.
    """
    anchor = op.anchor
    if anchor.shape == target.shape:
        return invert_diagonal(op, target, scale)
    if anchor.dim() != target.dim() or len(anchor) != len(target):
        return invert_by_autograd(op, target)
    missing = shortfall(op, target)
    scale = scale.to(missing.dtype).expand_as(missing)
    size = scale.square().sum_to_size(anchor.shape).sqrt()
    along = (scale * missing).sum_to_size(anchor.shape) / torch.where(size > 0, size, 1)
    solved = solve_diagonal(size, along, op.settings)
    return moved(op, target, solved.value, solved)


def scaled(key: str, gain: Gain) -> Rule:
    """A rule for y = gain · x + constant, entry by entry."""

    def invert(op: Op, target: Tensor) -> Inverse:
        """(t − constant) / gain, entry by entry; zeros of the gain leave the input where it is."""
        anchor = op.anchor
        return invert_scaled(op, target, torch.as_tensor(gain(op), dtype=anchor.dtype, device=anchor.device))

    return Rule(key, invert, Kind.AFFINE)


def rules() -> list[Rule]:
    return [
        scaled("add", lambda op: 1 if first(op) else alpha(op)),
        scaled("sub", lambda op: 1 if first(op) else -alpha(op)),
        scaled("rsub", lambda op: -alpha(op) if first(op) else 1),
        scaled("mul", constant),
        scaled("neg", lambda op: -1),
        scaled("addcmul", factor),
        scaled("lerp", share),
    ]
