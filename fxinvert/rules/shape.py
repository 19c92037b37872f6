"""Ops that only move values, or do nothing in evaluation: the target moves back. One line per op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.rules.certificate import Inverse, passed_through
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule

Back = Callable[[Op, Tensor], Tensor]


def reshaped(op: Op, target: Tensor) -> Tensor:
    return target.reshape(op.anchor.shape)


def permuted(op: Op, target: Tensor) -> Tensor:
    rank = op.anchor.dim()
    order = [axis % rank for axis in op.attributes["dims"]]
    return target.permute([order.index(axis) for axis in range(rank)])


def transposed(op: Op, target: Tensor) -> Tensor:
    return target.transpose(op.attributes["dim0"], op.attributes["dim1"])


def moves(key: str, back: Back) -> Rule:
    """A rule for an op that rearranges the entries of its input without loss; `back` undoes it."""

    def invert(op: Op, target: Tensor) -> Inverse:
        return passed_through(back(op, target), op.anchor)

    return Rule(key, invert, Kind.MOVES)


def rules() -> list[Rule]:
    return [
        moves("alias", reshaped),
        moves("clone", reshaped),
        moves("contiguous", reshaped),
        moves("detach", reshaped),
        moves("dropout", reshaped),
        moves("feature_dropout", reshaped),
        moves("alpha_dropout", reshaped),
        moves("feature_alpha_dropout", reshaped),
        moves("flatten", reshaped),
        moves("reshape", reshaped),
        moves("view", reshaped),
        moves("unflatten", reshaped),
        moves("squeeze", reshaped),
        moves("unsqueeze", reshaped),
        moves("permute", permuted),
        moves("transpose", transposed),
        moves("flip", lambda op, target: torch.flip(target, op.attributes["dims"])),
    ]
