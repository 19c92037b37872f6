"""Matrix products with one unknown operand: every row (or column) of it is a system of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fxinvert.linalg import Correction, Dense
from fxinvert.rules.affine import Rows, invert_affine, invert_by_autograd, moved, shortfall
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.op import Op


def invert_product(op: Op, target: Tensor, matrix: Tensor, *, left: bool) -> Inverse:
    """Nearest x for y = x @ matrix (`left`) or y = matrix @ x, apart from what is added to y.

    One matrix for all samples is factorized once; a batch of matrices is solved as a batch. Where a batch of matrices
    spreads one x over several outputs, the systems are no longer small: they are solved as those of any affine op,
    or matrix-free if they differ from sample to sample.
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
    own = weight.dim() == outputs.dim() and len(weight) > 1
    if outputs.shape[:-2] != op.anchor.shape[:-2]:
        return invert_matrix_free(op, target) if own else invert_by_autograd(op, target)
    missing = _columns(shortfall(op, target), matrix, left=left)
    solved = solve_batched(weight.mT, missing, op.settings.limit(target.dtype))
    return moved(op, target, solved.value if left else solved.value.mT, solved)


def solve_batched(matrices: Tensor, r: Tensor, limit: float) -> Correction:
    """A⁺_λ r for every row r of a batch, damped row by row as `solve_anchored` does.

    Args:
        matrices: A, `(…, m, n)`, one for each group of rows; a matrix that is not finite gives NaN.
        r: `(…, rows, m)`.
        limit: κ.
    """
    finite = torch.isfinite(matrices).all(-1).all(-1)[..., None, None]
    u, values, vt = torch.linalg.svd(torch.where(finite, matrices, 0).double(), full_matrices=False)
    largest = values[..., :1]
    kept = values > max(matrices.shape[-2:]) * torch.finfo(values.dtype).eps * largest
    gains = torch.where(kept, 1 / torch.where(kept, values, 1), 0)[..., None, :]
    values, largest = values[..., None, :], largest[..., None, :]
    coefficients = r.double() @ u
    free = coefficients * gains
    size = torch.linalg.vector_norm(r.double(), dim=-1, keepdim=True)
    amplified = largest * torch.linalg.vector_norm(free, dim=-1, keepdim=True) > limit * size
    damping = torch.where(amplified, (largest / limit).square(), 0)
    damped = coefficients * values / torch.where(amplified, values.square() + damping, 1)
    correction = torch.where(finite, torch.where(amplified, damped, free) @ vt, torch.nan)
    condition = largest * gains.amax(-1, keepdim=True)
    return Correction(
        correction.to(r.dtype),
        amplified,
        float(damping.max()) if damping.numel() else 0.0,
        0,
        (float(condition.max()) or None) if condition.numel() else None,
    )


def _columns(value: Tensor, matrix: Tensor, *, left: bool) -> Tensor:
    """An output with the entries that one row or column of x makes along its last axis: `(…, rows, m)`."""
    if matrix.dim() == 1:
        return value.unsqueeze(-1)
    return value if left else value.mT
