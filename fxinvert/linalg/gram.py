"""Direct solves on the smaller side: with (AAᵀ + λI)⁻¹ or (AᵀA + λI)⁻¹, whichever is the smaller matrix.

A Gram matrix has the square of A's condition, so it is factorized in float64, and where that does not suffice the solve is
refined with the residual of the system (Golub 1965). Where K is singular to working precision it is factorized with a
shift μ (Riley 1955), and its inverse is the preconditioner of conjugate gradients on the normal equations: an answer has
no trace of the shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.definite import NotDefiniteError, definite_inverse, without_dead
from fxinvert.linalg.operators import LinearOperator, Shape
from fxinvert.linalg.solvers import ARRIVED, REFINED, SINGLE, Factor, Solution
from fxinvert.linalg.vectors import dot, flat, norm, per_sample

#: condition from which the Gram matrix is shifted
SHIFTED = 1e7
#: the first shift, relative to σ_max², where K is AAᵀ, so that the shift is divided by, and else; and the last
FIRST_SHIFT, LAST_SHIFT = {True: 1e-7, False: 1e-9}, 1e-3
#: relative error that an answer may have unrefined, in single and double precision
UNREFINED = {torch.float32: 1e-4, torch.float64: 1e-11}
#: relative error of a factorization's own answers beyond which it is useless, even to refine them
USEFUL = 1e-3
#: what a product of A with x may be off, relative to σ_max‖x‖
ROUNDING = 32 * torch.finfo(torch.float64).eps
#: relative error of unrefined answers from which another factorization is the better way, if it can be had: what refining
#: leaves of it is beyond single precision, but not beyond double precision
STRAINED = {torch.float32: 0.1, torch.float64: 1e-6}
#: largest number of refinements, and of iterations where the Gram matrix is shifted
REFINEMENTS, ITERATIONS = 20, 200


class Inverse(Protocol):
    """(K + μI)⁻¹, ready to be applied."""

    dtype: torch.dtype

    @property
    def nbytes(self) -> int: ...

    def solve(self, value: Tensor) -> Tensor:
        """`(B, *shape)` → the same, in `dtype`."""

    def to(self, dtype: torch.dtype) -> None:
        """Solves in another dtype from now on."""


class DenseInverse:
    """(K + μI)⁻¹ as a matrix.

    Args:
        gram: K in float64.
        shape: of the vectors.
        shift: μ.

    Raises:
        NotDefiniteError: K + μI is not positive definite to working precision.
    """

    def __init__(self, gram: Tensor, shape: Shape, shift: float) -> None:
        self.shape, self.dtype = shape, torch.float64
        shifted = without_dead(gram)
        shifted.diagonal().add_(shift)
        self._inverse = definite_inverse(shifted)

    @property
    def nbytes(self) -> int:
        return self._inverse.nbytes

    def solve(self, value: Tensor) -> Tensor:
        return (flat(value).to(self.dtype) @ self._inverse).reshape(len(value), *self.shape)

    def to(self, dtype: torch.dtype) -> None:
        self._inverse, self.dtype = self._inverse.to(dtype), dtype


class _Level:
    """One damping's factorization, with the dtypes that its condition asks for.

    Args:
        factorized: makes (K + μI)⁻¹ from μ.
        exact: A in float64.
        dual: whether K is AAᵀ, or else AᵀA.
        dtype: of the right-hand sides.
        largest: σ_max.
        damping: λ.
    """

    def __init__(
        self,
        factorized: Callable[[float], Inverse],
        exact: LinearOperator,
        dual: bool,
        dtype: torch.dtype,
        largest: float,
        damping: float,
    ) -> None:
        square = largest**2
        generator = torch.Generator().manual_seed(0)
        here, there = (exact.out_shape, exact.in_shape) if dual else (exact.in_shape, exact.out_shape)
        start, other = (
            torch.randn(4, *shape, generator=generator, dtype=torch.float64).to(exact.device)
            for shape in (here, there)
        )
        # what A can give, and anything at all, of which the parts that it nearly annuls lose most
        right = torch.cat([exact.apply(other) if dual else exact.adjoint(other), start])
        self.shift = 0.0
        while True:
            try:
                self.inverse = factorized(damping + self.shift)
            except NotDefiniteError:
                smallest, left, worst = 0.0, math.inf, math.inf
            else:
                smallest = _smallest(self.inverse, start)
                found = self.inverse.solve(right)
                product = exact.apply(exact.adjoint(found)) if dual else exact.adjoint(exact.apply(found))
                missed = norm(product + (damping + self.shift) * found - right) / norm(right)
                left, worst = float(missed[: len(other)].max()), float(missed.max())
            if smallest > 0 and left <= USEFUL and (self.shift or smallest * SHIFTED**2 > square):
                break
            self.shift = max(FIRST_SHIFT[dual] * square, 100 * self.shift)
            if self.shift > LAST_SHIFT * square:
                raise SolveError(
                    "the Gram matrix is not positive definite, however it is shifted; its entries overflow"
                )
        #: of the system as it is solved, and of A: σ_max over the smallest singular value
        self.system = math.sqrt((square + damping + self.shift) / smallest)
        self.condition = largest / math.sqrt(
            max(smallest - damping - self.shift, 0) or self.shift or smallest
        )
        lost = max(self.system**2, worst / torch.finfo(torch.float64).eps)
        if dtype == torch.float32 and lost <= SINGLE**2:
            self.inverse.to(torch.float32)
        #: what rounding may do to an answer
        self.error = math.inf if self.shift else lost * torch.finfo(self.inverse.dtype).eps


class GramFactor(Factor):
    """A⁺_λ by a factorization of the smaller Gram matrix, one for every damping that is asked for.

    Args:
        operator: A.
        factorized: makes (K + μI)⁻¹ from μ, for K = AAᵀ where A has no more outputs than inputs, else AᵀA.
        method: how, in words.
        held: bytes that `factorized` holds.

    Raises:
        SolveError: the Gram matrix cannot be factorized.
    """

    def __init__(
        self, operator: LinearOperator, factorized: Callable[[float], Inverse], method: str, held: int = 0
    ) -> None:
        super().__init__(operator)
        m, n = operator.size
        self.dual = m <= n
        self._operators = {dtype: operator.to(dtype) for dtype in (operator.dtype, torch.float64)}
        self._factorized, self._method, self._held = factorized, method, held
        self.largest = operator.norm()
        self._levels: dict[float, _Level] = {}
        self.condition = self._level(0.0).condition if self.largest else None

    @property
    def rounding(self) -> float:
        """What rounding may do to an unrefined answer, relative to it; infinite where the Gram matrix had to be shifted."""
        return self._level(0.0).error if self.largest else 0.0

    @property
    def strained(self) -> bool:
        """Whether the Gram matrix is so ill-conditioned that answers have to be refined to be any good."""
        return self.rounding > STRAINED[self.operator.dtype]

    @property
    def nbytes(self) -> int:
        return self._held + sum(level.inverse.nbytes for level in self._levels.values())

    def explain(self) -> str:
        if not self.largest:
            return "nothing: the operator is zero"
        level = self._level(0.0)
        side = "AAᵀ" if self.dual else "AᵀA"
        shift = f", shifted by {level.shift:.1e} and refined" if level.shift else ""
        return f"{self._method} of {side} in {str(level.inverse.dtype).removeprefix('torch.')}{shift}"

    def solve(self, r: Tensor, damping: float, limit: float = math.inf) -> Solution:
        if not self.largest:
            return Solution(r.new_zeros(len(r), *self.operator.in_shape))
        level = self._level(damping)
        a = self._operators[level.inverse.dtype]
        right = r.to(a.dtype)
        y = level.inverse.solve(right if self.dual else a.adjoint(right))
        x = a.adjoint(y) if self.dual else y
        if level.error <= UNREFINED[r.dtype] or not len(r):
            return Solution(x.to(r.dtype))
        y, x, right = y.double(), x.double(), r.double()
        if level.shift:
            x, steps, converged = self._conjugate(level, right, x, damping, r.dtype, limit)
        else:
            x, steps, converged = self._refined(level, right, y, x, damping, r.dtype)
        return Solution(x.to(r.dtype), steps, converged)

    def unrefined(self, value: Tensor) -> Tensor:
        """(K + μI)⁻¹ of vectors of the smaller side, as it was factorized, undamped: `(B, *shape)` → the same."""
        return self._level(0.0).inverse.solve(value)

    def _refined(
        self, level: _Level, r: Tensor, y: Tensor, x: Tensor, damping: float, dtype: torch.dtype
    ) -> tuple[Tensor, int, Tensor]:
        """Refines the rows that need it, until they do not, or are no better for it.

        A small residual does not tell how far an answer is from the exact one. Every step leaves so much of that as rounding
        does of an answer, which is how often all rows are refined.
        """
        a, steps = self._operators[torch.float64], 0
        least = math.ceil(math.log(UNREFINED[dtype]) / math.log(level.error)) - 1 if level.error < 1 else 0
        active = torch.arange(len(r), device=r.device)
        best = torch.full((len(r),), torch.inf, dtype=r.dtype, device=r.device)
        converged = torch.zeros(len(r), dtype=torch.bool, device=r.device)
        while True:
            rho = r[active] - a.apply(x[active])
            slope = a.adjoint(rho) - damping * x[active]
            missing = rho - damping * y[active] if self.dual else slope
            error, done = norm(slope), self._done(rho, slope, r[active], x[active], dtype)
            if self.dual and not damping:
                # K is definite, so that every target is reached; what is left of it may have next to no slope
                error = norm(rho)
                done = self._reached(rho, r[active], x[active], dtype)
            converged[active] = done | self._arrived(rho, slope, r[active], dtype)
            going = ~done & (error < 0.9 * best[active])
            if steps < least:
                going = torch.isfinite(error)
            best[active] = error
            active, missing = active[going], missing[going]
            if not len(active) or steps == REFINEMENTS:
                return x, steps, converged
            steps += 1
            change = level.inverse.solve(missing).double()
            x[active] += a.adjoint(change) if self.dual else change
            if self.dual:
                y[active] += change

    def _conjugate(
        self, level: _Level, r: Tensor, x: Tensor, damping: float, dtype: torch.dtype, limit: float
    ) -> tuple[Tensor, int, Tensor]:
        """Conjugate gradients on the normal equations from x, the shifted inverse as preconditioner.

        On the dual side (AᵀA + μI)⁻¹ = (I − Aᵀ(AAᵀ + μI)⁻¹A) / μ, so that no part of x is outside the range of Aᵀ.
        """
        a, steps = self._operators[torch.float64], 0

        def smoothed(s: Tensor) -> Tensor:
            if not self.dual:
                return level.inverse.solve(s)
            return (s - a.adjoint(level.inverse.solve(a.apply(s)))) / (damping + level.shift)

        active = torch.arange(len(r), device=r.device)
        converged = torch.zeros(len(r), dtype=torch.bool, device=r.device)
        rho = r - a.apply(x)
        s = a.adjoint(rho) - damping * x
        p, gamma = torch.zeros_like(s), r.new_full((len(r),), torch.inf)
        while True:
            done = self._done(rho, s, r[active], x[active], dtype)
            done |= self.largest * norm(x[active]) > limit * norm(r[active])
            converged[active] = done | self._arrived(rho, s, r[active], dtype)
            active, rho, s, p, gamma = (v[~done] for v in (active, rho, s, p, gamma))
            if not len(active) or steps == ITERATIONS:
                return x, steps, converged
            steps += 1
            w = smoothed(s)
            renewed = dot(s, w)
            p, gamma = w + per_sample(renewed / gamma, p) * p, renewed
            q = a.apply(p)
            alpha = gamma / (dot(q, q) + damping * dot(p, p))
            x[active] += per_sample(alpha, p) * p
            rho = rho - per_sample(alpha, q) * q
            s = a.adjoint(rho) - damping * x[active]

    def _done(self, rho: Tensor, slope: Tensor, r: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether a row's residual or slope is small, as far as a product with x can tell, or not finite."""
        rounding = ROUNDING * self.largest * norm(x)
        small = norm(slope) <= self.largest * (REFINED[dtype] * norm(rho) + rounding)
        return small | self._reached(rho, r, x, dtype)

    def _reached(self, rho: Tensor, r: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether a row's residual is small, as far as a product with x can tell, or not finite."""
        rounding = ROUNDING * self.largest * norm(x)
        done: Tensor = (norm(rho) <= REFINED[dtype] * norm(r) + rounding) | ~torch.isfinite(norm(rho))
        return done

    def _arrived(self, rho: Tensor, slope: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether a row has half of its digits."""
        level = norm(slope) <= ARRIVED[dtype] * self.largest * norm(rho)
        arrived: Tensor = level | (norm(rho) <= ARRIVED[dtype] * norm(r))
        return arrived

    def _level(self, damping: float) -> _Level:
        if damping not in self._levels:
            # one damping besides none: κ seldom changes
            self._levels = {0.0: self._levels[0.0]} if 0.0 in self._levels else {}
            exact, dtype = self._operators[torch.float64], self.operator.dtype
            self._levels[damping] = _Level(self._factorized, exact, self.dual, dtype, self.largest, damping)
        return self._levels[damping]


def _smallest(inverse: Inverse, start: Tensor, iterations: int = 8) -> float:
    """The smallest eigenvalue of K + μI by inverse iteration; an upper bound, a little above."""
    value = start
    for _ in range(iterations):
        size = norm(value)
        if not bool(torch.isfinite(size).all()):
            return 0.0
        value = inverse.solve(value / per_sample(size, value))
    largest = float(norm(value).max())
    return 1 / largest if largest > 0 and math.isfinite(largest) else 0.0
