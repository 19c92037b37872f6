"""Inverses of positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor


class NotDefiniteError(ArithmeticError):
    """A matrix is not positive definite to working precision."""


def definite_inverse(matrices: Tensor) -> Tensor:
    """The inverses of symmetric positive definite `(…, n, n)`.

    Raises:
        NotDefiniteError: one of them is not.
    """
    return torch.cholesky_inverse(definite_factor(matrices))


def definite_factor(matrices: Tensor) -> Tensor:
    """The lower triangular factors (Cholesky) of symmetric positive definite `(…, n, n)`.

    Raises:
        NotDefiniteError: one of them is not.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()) or not bool(torch.isfinite(factors.diagonal(dim1=-2, dim2=-1)).all()):
        raise NotDefiniteError
    lower: Tensor = factors
    return lower


def without_dead(gram: Tensor) -> Tensor:
    """Symmetric `(…, n, n)` in which unknowns that meet nothing, themselves included, get a diagonal entry of their own: in place."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax()
    diagonal += torch.where(diagonal == 0, torch.where(largest > 0, largest, 1.0), 0.0)
    return gram
