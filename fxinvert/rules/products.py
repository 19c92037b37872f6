"""Matrix products with one unknown operand: every row (or column) of it is a system of its own."""

from __future__ import annotations

from torch import Tensor

from fxinvert.linalg import Dense
from fxinvert.linalg.each import solve_batched
from fxinvert.rules.affine import Rows, invert_affine, invert_by_autograd, moved, shortfall
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.op import Op


def invert_product(op: Op, target: Tensor, matrix: Tensor, *, left: bool) -> Inverse:
    """Nearest x for y = x @ matrix (`left`) or y = matrix @ x, apart from what is added to y.

    One matrix for all samples is factorized once; a batch of matrices is solved as a batch. Where a batch of matrices
    spreads one x over several outputs, the systems are no longer small: they are solved as those of any affine op.
    """
    rows = Rows(
        lambda value: _columns(value, matrix, left=left).flatten(0, -2),
        lambda value, like: value.reshape_as(like) if left else value.reshape(like.mT.shape).mT,
    )
    weight = matrix.unsqueeze(-1) if matrix.dim() == 1 else matrix if left else matrix.mT
    if op.anchor.dim() < (2 if left else 3):
        return invert_by_autograd(op, target)
    if weight[..., 0, 0].numel() == 1:
        return invert_affine(op, target, lambda: Dense(weight.reshape(weight.shape[-2:]).T), rows)
    outputs = _columns(target, matrix, left=left)
    if outputs.shape[:-2] != op.anchor.shape[:-2]:
        return invert_by_autograd(op, target)
    missing = _columns(shortfall(op, target), matrix, left=left)
    solved = solve_batched(weight.mT, missing, op.settings.limit(target.dtype))
    return moved(op, target, solved.value if left else solved.value.mT, solved)


def _columns(value: Tensor, matrix: Tensor, *, left: bool) -> Tensor:
    """An output with the entries that one row or column of x makes along its last axis: `(…, rows, m)`."""
    if matrix.dim() == 1:
        return value.unsqueeze(-1)
    return value if left else value.mT
