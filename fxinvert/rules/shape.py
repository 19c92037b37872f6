"""Ops that keep every entry and their order, or do nothing in evaluation: the target gets the anchor's shape back."""

from __future__ import annotations

from torch import Tensor

from fxinvert.rules.certificate import Inverse, passed_through
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule


def reshaped(op: Op, target: Tensor) -> Inverse:
    """The target in the input's shape."""
    return passed_through(target.reshape(op.anchor.shape), op.anchor)


def keeps(key: str) -> Rule:
    return Rule(key, reshaped, Kind.MOVES)


def rules() -> list[Rule]:
    return [
        keeps("alias"),
        keeps("clone"),
        keeps("contiguous"),
        keeps("detach"),
        keeps("dropout"),
        keeps("feature_dropout"),
        keeps("alpha_dropout"),
        keeps("feature_alpha_dropout"),
        keeps("flatten"),
        keeps("reshape"),
        keeps("reshape_as"),
        keeps("view"),
        keeps("view_as"),
        keeps("unflatten"),
        keeps("squeeze"),
        keeps("unsqueeze"),
    ]
