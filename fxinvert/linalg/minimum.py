"""What damped Gauss–Newton is asked for, and what it finds (`gauss_newton.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Minimum:
    """What damped Gauss–Newton has found, sample by sample.

    Attributes:
        value: `(B, …)`, x*.
        reached: `(B,)`, f(x*) is the target up to the tolerance.
        nearest: `(B,)`, x* − x0 has no part in the null space of the Jacobian there.
        stationary: `(B,)`, the error has no slope at x*.
        failed: `(B,)`, the target, the anchor or its output is not finite.
        products: `(B,)`, pairs of products with J and Jᵀ.
        damping: `(B,)`, largest damping of a step that was taken.
    """

    value: Tensor
    reached: Tensor
    nearest: Tensor
    stationary: Tensor
    failed: Tensor
    products: Tensor
    damping: Tensor


@dataclass(frozen=True)
class Settings:
    """See `gauss_newton`."""

    tolerance: float
    condition_limit: float
    limit: int
    worthwhile: float = 0.0
