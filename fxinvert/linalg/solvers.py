"""Solvers for the anchored, damped problem: factor once, solve many.

With r = t − f(x0) every solver computes the correction

    A⁺_λ r = Aᵀ(AAᵀ + λI)⁻¹ r = (AᵀA + λI)⁻¹Aᵀ r,

the minimizer of ‖A d − r‖² + λ‖d‖² (Tikhonov), for λ = 0 the least-squares solution of least norm (Moore–Penrose).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.vectors import dot, norm, per_sample

#: condition up to which solves are made in float32: its square times 6e-8 is the worst that rounding does to an answer
SINGLE = 32.0
#: relative error to which an answer is refined, and with which it has arrived all the same, in single and double precision
REFINED = {torch.float32: 1e-6, torch.float64: 1e-12}
ARRIVED = {torch.float32: 3e-5, torch.float64: 1e-7}
#: largest σ_max, and inverse of the least, for which an iteration may run in single precision: squares of σ_max² must neither
#: overflow nor vanish
RANGE = 1e6
#: bytes of work for every number on either side: a few vectors in double precision
WORK = 6 * 8


class Solution(NamedTuple):
    """What a solver has found.

    Attributes:
        correction: `(B, *in_shape)`.
        iterations: that it took.
        converged: `(B,)`, samples that did; None: all.
        near: `(B,)`, samples whose corrections are as near the exact ones as asked for; None: that is not known.
    """

    correction: Tensor
    iterations: int = 0
    converged: Tensor | None = None
    near: Tensor | None = None


class Factor(ABC):
    """An operator made ready for many right-hand sides.

    Attributes:
        largest: the largest singular value σ_max.
        condition: σ_max over the smallest singular value that is kept; None where it is not known.
        manageable: the κ for which an iteration converges with λ = (σ_max/κ)², however small singular values are.
        chosen: why it was chosen, see `Choice.explain`; empty where it was not.
    """

    largest: float
    condition: float | None = None
    manageable: float = math.inf
    chosen: str = ""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        #: bytes that a solve works on, for every right-hand side
        self.work = WORK * sum(operator.size)

    def error(self, r: Tensor, correction: Tensor, damping: float) -> Tensor:
        """`(B,)`: how far corrections d are from being solutions, by ρ = r − A d.

        The smaller one of ‖ρ‖ / ‖r‖ and, as no target can be told to be reachable, ‖Aᵀρ − λd‖ / (σ_max‖ρ‖).
        """
        exact, x = self.operator.to(torch.float64), correction.double()
        rho = r.double() - exact.apply(x)
        slope, left = norm(exact.adjoint(rho) - damping * x), norm(rho)
        return torch.minimum(slope / (self.largest * left), left / norm(r.double()))

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that it holds."""

    @abstractmethod
    def explain(self) -> str:
        """How it solves, in a few words."""

    @abstractmethod
    def solve(self, r: Tensor, damping: float, limit: float = math.inf) -> Solution:
        """A⁺_λ r for `r` of shape `(B, *out_shape)` and λ = `damping`.

        Args:
            r: the right-hand sides.
            damping: λ.
            limit: an iteration need not go on with a correction d for which σ_max‖d‖ > limit · ‖r‖.
        """


class SpectralFactor(Factor):
    """Singular value decomposition A = U S Vᵀ, made and applied in float64: A⁺_λ = V S (S² + λ)⁻¹ Uᵀ, for each group of A.

    Singular values below `max(m, n) · ε · σ_max` count as zero. Applied factor by factor, a target that can be reached
    is reached whatever the condition; the pseudo-inverse as one matrix costs condition · ε, and half the time, so it
    is used where that is little. In float32 its rounding alone would cost condition · 1e-7, so that it is applied in
    float32 to well-conditioned operators only.
    """

    #: largest condition number for which the pseudo-inverse is applied as one matrix
    MATRIX_LIMIT = 1e6

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        a = operator.to(torch.float64).blocks()
        if not bool(torch.isfinite(a).all()):
            raise operator.not_finite()
        if a.shape[1] < a.shape[2]:  # the decomposition is several times faster for tall matrices
            v, values, ut = torch.linalg.svd(a.mT, full_matrices=False)
        else:
            u, values, vt = torch.linalg.svd(a, full_matrices=False)
            v, ut = vt.mT, u.mT
        self.largest = float(values.max()) if values.numel() else 0.0
        kept = values > max(operator.size) * torch.finfo(a.dtype).eps * self.largest
        self.condition = self.largest / float(values[kept].min()) if bool(kept.any()) else None
        most = int(kept.sum(1).max()) if kept.numel() else 0
        # a group of less rank than others has infinite ones in place of those that are left out
        self._values = torch.where(kept, values, math.inf)[:, :most]
        self._v, self._ut = v[..., :most], ut[:, :most]
        well = self.condition is not None and self.condition <= self.MATRIX_LIMIT
        self._inverse = (self._v / self._values[:, None]) @ self._ut if well else None
        if self._inverse is not None and self.condition is not None and self.condition <= SINGLE:
            self._inverse = self._inverse.to(operator.dtype)

    @property
    def rank(self) -> int:
        """Number of singular values that are kept."""
        return int(torch.isfinite(self._values).sum())

    @property
    def nbytes(self) -> int:
        kept = self._v, self._ut, self._inverse
        return sum(t.nbytes for t in kept if t is not None)

    def explain(self) -> str:
        if self._inverse is None:
            return "singular value decomposition in float64, applied by its factors"
        dtype = str(self._inverse.dtype).removeprefix("torch.")
        return f"singular value decomposition in float64, applied as one matrix in {dtype} where nothing is damped"

    def solve(self, r: Tensor, damping: float, limit: float = math.inf) -> Solution:
        groups, (m, _) = self.operator.groups, self.operator.size
        rows = r.reshape(len(r), groups, m // groups).movedim(1, 0)
        if self._inverse is not None and not damping:
            correction = rows.to(self._inverse.dtype) @ self._inverse.mT
        else:
            gains = 1 / (self._values + damping / self._values)
            correction = (rows.double() @ self._ut.mT * gains[:, None]) @ self._v.mT
        return Solution(correction.movedim(0, 1).reshape(len(r), *self.operator.in_shape).to(r.dtype))


class DiagonalFactor(Factor):
    """Where AᵀA is a diagonal D: A⁺_λ r = (D + λ)⁻¹ Aᵀ r, entry by entry; nothing goes where D is zero."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        squares = operator.squares
        assert squares is not None
        if not bool(torch.isfinite(squares).all()):
            raise operator.not_finite()
        self.squares = squares
        kept = squares[squares > 0]
        if kept.numel():
            self.largest = float(kept.max()) ** 0.5
            self.condition = self.largest / float(kept.min()) ** 0.5
        else:
            self.largest = 0.0

    @property
    def nbytes(self) -> int:
        return self.squares.nbytes

    def explain(self) -> str:
        return "entry by entry: AᵀA is diagonal"

    def solve(self, r: Tensor, damping: float, limit: float = math.inf) -> Solution:
        ridge = self.squares + damping
        return Solution(
            torch.where(ridge > 0, self.operator.adjoint(r) / torch.where(ridge > 0, ridge, 1), 0)
        )


class Gradients(NamedTuple):
    """What conjugate gradients have found, row by row.

    Attributes:
        correction: `(B, *in_shape)`, A⁺_λ r.
        dual: `(B, *out_shape)`, the z with correction = Aᵀ z.
        iterations: `(B,)`, pairs of products with A and Aᵀ, after the first product Aᵀ r.
        converged: `(B,)`, samples that are done; the others met the limit. Those that are not finite are done, too.
        slope: `(B,)`, ‖Aᵀ r‖ at the start.
        largest: `(B,)`, the largest of the estimate that was given and of ‖A p‖ / ‖p‖ on the way, so σ_max or less.
    """

    correction: Tensor
    dual: Tensor
    iterations: Tensor
    converged: Tensor
    slope: Tensor
    largest: Tensor

    def replaced(self, rows: Tensor, others: Gradients) -> Gradients:
        """These, but for some rows, `(B,)`, those of others."""
        return Gradients(*(torch.where(per_sample(rows, a), a, b) for a, b in zip(others, self, strict=True)))


def cgls(
    operator: LinearOperator,
    r: Tensor,
    damping: Tensor,
    *,
    largest: Tensor,
    tolerance: float,
    small_enough: Tensor,
    limit: int | Tensor,
    slope: Tensor | float = 0.0,
    skip: Tensor | None = None,
    pulled: Tensor | None = None,
) -> Gradients:
    """Batched conjugate gradients on the normal equations, started at zero (CGLS, Björck 1996, §7.4).

    Args:
        operator: A, which may be another one for every row.
        r: `(B, *out_shape)`.
        damping: `(B,)`, λ of every row.
        largest: `(B,)`, an estimate of σ_max, or 0.
        tolerance: a row is done where ‖Aᵀ ρ − λ d‖ ≤ tolerance · σ_max ‖ρ‖ for its residual ρ = r − A d,
        small_enough: `(B,)`, or where ‖ρ‖ is this or less.
        limit: on the number of iterations; may be `(B,)`.
        slope: `(B,)`, or where ‖Aᵀ ρ − λ d‖ ≤ slope · ‖Aᵀ r‖.
        skip: `(B,)`, rows that are not solved; they get 0.
        pulled: Aᵀ r, where that is known.
    """
    x = torch.zeros(len(r), *operator.in_shape, dtype=r.dtype, device=r.device)
    dual, residual, p, u = torch.zeros_like(r), r, torch.zeros_like(x), torch.zeros_like(r)
    iterations = torch.zeros(len(r), dtype=torch.long, device=r.device)
    s = operator.adjoint(r) if pulled is None else pulled
    start, size, gamma = dot(s, s), dot(r, r), torch.ones_like(damping)
    # a sample that is not finite has no solution, and must not keep the others iterating
    converged = ~torch.isfinite(start) if skip is None else ~torch.isfinite(start) | skip
    while True:
        renewed = dot(s, s)
        level = (renewed <= (tolerance * largest).square() * size) | (renewed <= start * slope**2)
        idle = converged | (iterations >= limit)
        converged = converged | (~idle & (level | (renewed == 0)))
        idle = idle | converged
        if bool(idle.all()):
            break
        beta = torch.where(idle, 0, renewed / torch.where(idle, 1, gamma))
        p, u = (
            s + per_sample(beta, p) * p,
            residual - per_sample(damping, dual) * dual + per_sample(beta, u) * u,
        )
        gamma, iterations = renewed, iterations + ~idle
        q, length = operator.apply(p), dot(p, p)
        squared = dot(q, q)
        largest = torch.where(idle, largest, torch.maximum(largest, (squared / length).sqrt()))
        curvature = squared + damping * length
        # along a direction that A does not see, in the digits there are, there is no step
        converged = converged | (~idle & (curvature < torch.finfo(r.dtype).tiny))
        idle = idle | converged
        alpha = torch.where(idle, 0, gamma / torch.where(idle, 1, curvature))
        x = x + per_sample(alpha, x) * p
        dual = dual + per_sample(alpha, r) * u
        residual = residual - per_sample(alpha, residual) * q
        size = dot(residual, residual)
        converged = converged | (size <= small_enough.square())
        if bool((converged | (iterations >= limit)).all()):
            break  # nobody takes another step, for which there would have to be another product
        s = operator.adjoint(residual) - per_sample(damping, x) * x
    return Gradients(x, dual, iterations, converged, start.sqrt(), largest)
