"""Ops that join an input with others, or write it into another: one line per op.

They copy (`movement.py`): y = A x + constant with at most one 1 in every row of A. What the other operands fill is not
the input's to reach: it stays in the residual.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.linalg.jacobian import Jacobian
from fxinvert.rules.affine import invert_by_autograd, invert_diagonal, shortfall
from fxinvert.rules.certificate import Inverse, Status, certified
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.movement import invert_movement, moves
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule


def place(op: Op) -> tuple[str, int]:
    """The name of the list that the unknown is in, and its place there: `tensors_1` is the second of `tensors`."""
    (name,) = op.anchors
    listed, _, position = name.rpartition("_")
    return listed, int(position)


def joined(op: Op, target: Tensor) -> Inverse:
    """Its own part of the target."""
    dim, (listed, position) = op.attributes["dim"], place(op)
    before = (op.parameters[f"{listed}_{i}"] for i in range(position))
    start = sum(other.shape[dim] for other in before if other.dim() == target.dim())  # (0,) joins anything
    _check_axis(op, dim, target.dim())
    return certified(op, target, target.narrow(dim, start, op.anchor.shape[dim]).contiguous(), Status.EXACT)


def stacked(op: Op, target: Tensor) -> Inverse:
    """Its own layer of the target."""
    dim = op.attributes["dim"]
    _check_axis(op, dim, target.dim())
    return certified(op, target, target.select(dim, place(op)[1]).contiguous(), Status.EXACT)


def _check_axis(op: Op, dim: int, axes: int) -> None:
    if dim % axes == 0:
        raise NoRuleError(
            f"node {op.name!r}, {op.key}: it joins batches (dim={dim}), so that a sample of one is no sample of the "
            "other; join along another axis"
        )


def written(op: Op, target: Tensor) -> Inverse:
    """What is written over is not seen, and stays."""
    reduce = op.attributes.get("reduce")
    if reduce == "add" or op.attributes.get("accumulate"):
        return added(op, target)
    return invert_movement(op, target) if reduce is None else invert_matrix_free(op, target)


def copied(op: Op, target: Tensor) -> Inverse:
    """What is copied is spread over what it is copied to; nothing is left of that."""
    if "src" not in op.anchors:
        raise NoRuleError(f"node {op.name!r}, {op.key}: what is written over has no influence on the result")
    # torch cannot differentiate it under its own name
    return invert_movement(replace(op, evaluate=lambda x: x.expand(target.shape)), target)


def added(op: Op, target: Tensor) -> Inverse:
    """The base takes all that is missing; values that are added to one place share it equally."""
    if "self" in op.anchors:
        return invert_diagonal(op, target, op.anchor.new_ones(()))
    own, missing = op.anchor.dtype, shortfall(op, target)
    sums = Jacobian(lambda x: op(x.to(own)).to(missing.dtype), op.anchor.to(missing.dtype))
    # every value goes to one place, so A Aᵀ is diagonal
    diagonal = sums.apply(sums.adjoint(torch.ones_like(missing)))
    correction = sums.adjoint(missing / torch.where(diagonal > 0, diagonal, 1))
    return certified(op, target, (op.anchor + correction).to(own), Status.NEAREST)


def rules() -> list[Rule]:
    return [
        *[Rule(key, joined, Kind.MOVES, counts_axes=True) for key in ("cat", "concat", "concatenate")],
        Rule("stack", stacked, Kind.MOVES, counts_axes=True),
        *[moves(key) for key in ("hstack", "dstack", "column_stack")],
        *[Rule(key, written, Kind.MOVES) for key in ("scatter", "index_copy", "index_put")],
        *[moves(key) for key in ("masked_scatter", "select_scatter", "slice_scatter", "diagonal_scatter")],
        Rule("copy", copied, Kind.MOVES),
        Rule("scatter_add", added, Kind.CLOSED_FORM),
        Rule("index_add", added, Kind.CLOSED_FORM),
        Rule("diff", invert_by_autograd, Kind.AFFINE),
    ]
