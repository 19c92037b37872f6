"""Arithmetic with a constant or a parameter: diagonal affine maps. One line per op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.linalg import Diagonal
from fxinvert.rules.affine import invert_affine, invert_by_autograd
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule

Gain = Callable[[Op, Tensor], Tensor]


def constant(op: Op) -> Tensor:
    """The operand that does not depend on the model's input, number or tensor."""
    numbers = [op.attributes[name] for name in ("self", "other") if name in op.attributes]
    (value,) = [op.parameters[name] for name in ("self", "other") if name in op.parameters] or numbers
    return torch.as_tensor(value, dtype=op.anchor.dtype, device=op.anchor.device)


def sign(first: int, second: int) -> Gain:
    """The gain of a sum: `first` where the unknown is the first operand, `second` · alpha where it is the other."""

    def gain(op: Op, one: Tensor) -> Tensor:
        return one * (first if "self" in op.anchors else second * op.attributes["alpha"])

    return gain


def scaled(key: str, gain: Gain) -> Rule:
    """A rule for y = gain · x + constant, entry by entry."""

    def invert(op: Op, target: Tensor) -> Inverse:
        anchor = op.anchor
        one = torch.ones((), dtype=anchor.dtype, device=anchor.device)
        factor = gain(op, one)
        per_sample = factor.dim() == anchor.dim() and factor.shape[0] != 1
        if anchor.shape != target.shape or per_sample:
            return invert_by_autograd(op, target)
        factor = factor[0] if factor.dim() == anchor.dim() else factor
        return invert_affine(op, target, lambda: Diagonal(factor, anchor.shape[1:]))

    return Rule(key, invert, Kind.AFFINE)


def rules() -> list[Rule]:
    return [
        scaled("add", sign(1, 1)),
        scaled("sub", sign(1, -1)),
        scaled("rsub", sign(-1, 1)),
        scaled("mul", lambda op, one: constant(op)),
        scaled("div", lambda op, one: 1 / constant(op)),
        scaled("neg", lambda op, one: -one),
    ]
