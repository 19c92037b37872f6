"""Direct solves on the smaller side: with (AAᵀ + λI)⁻¹ or (AᵀA + λI)⁻¹, whichever is the smaller matrix.

A Gram matrix has the square of A's condition, so it is factorized in float64, and where that does not suffice the solve is
refined with the residual of the system (Golub 1965). Where K is singular to working precision it is factorized with a
shift μ (Riley 1955), and its inverse is the preconditioner of conjugate gradients on the normal equations: an answer has
no trace of the shift. A convolution of full rank is equilibrated first, unless it is damped (`equilibrated.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxinvert.linalg.definite import NotDefiniteError
from fxinvert.linalg.equilibrated import equilibrated
from fxinvert.linalg.level import Even, Factorization, Level, Plain
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.solvers import ARRIVED, REFINED, Factor, Solution
from fxinvert.linalg.vectors import norm

#: relative error that an answer may have unrefined, in single and double precision
UNREFINED = {torch.float32: 1e-4, torch.float64: 1e-11}
#: what a product of A with x may be off, relative to σ_max‖x‖
ROUNDING = 32 * torch.finfo(torch.float64).eps
#: relative error of unrefined answers from which another factorization is the better way, if it can be had: what refining
#: leaves of it is beyond single precision, but not beyond double precision
STRAINED = {torch.float32: 0.1, torch.float64: 1e-6}
#: largest number of refinements, and of iterations where the Gram matrix is shifted
REFINEMENTS, ITERATIONS = 20, 400


class GramFactor(Factor):
    """A⁺_λ by a factorization of the smaller Gram matrix, one for every damping that is asked for.

    Args:
        operator: A.
        factorized: makes (K + μI)⁻¹ from A and μ, for K = AAᵀ where A has no more outputs than inputs, else AᵀA.
        method: how, in words.

    Raises:
        SolveError: the Gram matrix cannot be factorized.
    """

    def __init__(self, operator: LinearOperator, factorized: Factorization, method: str) -> None:
        super().__init__(operator)
        m, n = operator.size
        self.dual = m <= n
        self._operators = {dtype: operator.to(dtype) for dtype in (operator.dtype, torch.float64)}
        self._factorized, self._method = factorized, method
        self.largest = operator.norm()
        self._levels: dict[float, Level] = {}
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
        return sum(level.inverse.nbytes for level in self._levels.values())

    def explain(self) -> str:
        if not self.largest:
            return "nothing: the operator is zero"
        level = self._level(0.0)
        side = "AAᵀ" if self.dual else "AᵀA"
        how = f", shifted by {level.shift:.1e} and refined" if level.shift else ""
        if isinstance(level, Even):
            how = ", equilibrated where nothing is damped"
        return f"{self._method} of {side} in {str(level.inverse.dtype).removeprefix('torch.')}{how}"

    def solve(self, r: Tensor, damping: float, limit: float = math.inf) -> Solution:
        if not self.largest:
            return Solution(r.new_zeros(len(r), *self.operator.in_shape))
        level = self._level(damping)
        x, y = level.answer(r)
        if level.error <= UNREFINED[r.dtype] or not len(r):
            return Solution(x.to(r.dtype))
        x, right = x.double(), r.double()
        if level.shift:
            x, steps, converged = self._conjugate(level, right, x, damping, r.dtype, limit)
            return Solution(x.to(r.dtype), steps, converged)
        y = None if y is None else y.double()
        x, steps, converged, near = self._refined(level, right, y, x, damping, r.dtype)
        return Solution(x.to(r.dtype), steps, converged, near)

    def unrefined(self, value: Tensor) -> Tensor:
        """(K + μI)⁻¹ of vectors of the smaller side, as it was factorized, undamped: `(B, *shape)` → the same."""
        return self._level(0.0).solve(value)

    def _refined(
        self, level: Level, r: Tensor, y: Tensor | None, x: Tensor, damping: float, dtype: torch.dtype
    ) -> tuple[Tensor, int, Tensor, Tensor]:
        """Refines the rows that need it, until they do not, or are no better for it; which have converged, and which are near.

        A small residual does not tell how far an answer is from the exact one: in the worst case all that is left of it is in
        the direction that A nearly annuls.
        """
        a, steps, least = self._operators[torch.float64], 0, self.largest / level.condition
        active = torch.arange(len(r), device=r.device)
        best = torch.full((len(r),), torch.inf, dtype=r.dtype, device=r.device)
        converged, near = torch.zeros(2, len(r), dtype=torch.bool, device=r.device)
        while True:
            rho = r[active] - a.apply(x[active])
            slope = a.adjoint(rho) - damping * x[active]
            error, done = norm(slope), self._done(rho, slope, r[active], x[active], dtype)
            away = error / (least**2 + damping)
            if self.dual and y is None:
                # K is definite, so that every target is reached; what is left of it may have next to no slope
                error = norm(rho)
                done = self._reached(rho, r[active], x[active], dtype)
                away = error / least
            far = away > UNREFINED[dtype] * norm(x[active])
            converged[active], near[active] = done | self._arrived(rho, slope, r[active], dtype), ~far
            going = (~done | far) & (error < 0.9 * best[active])
            best[active] = error
            active, rho, slope = active[going], rho[going], slope[going]
            if not len(active) or steps == REFINEMENTS:
                return x, steps, converged, near
            steps += 1
            more, beside = level.change(rho, slope, None if y is None else y[active])
            x[active] += more
            if y is not None and beside is not None:
                y[active] += beside

    def _conjugate(
        self, level: Level, r: Tensor, x: Tensor, damping: float, dtype: torch.dtype, limit: float
    ) -> tuple[Tensor, int, Tensor]:
        """Conjugate gradients on the normal equations from x, the shifted inverse as preconditioner, for each group by itself.

        On the dual side (AᵀA + μI)⁻¹ = (I − Aᵀ(AAᵀ + μI)⁻¹A) / μ, so that no part of x is outside the range of Aᵀ. As many
        steps as K has eigenvalues far below μ lead there, and a group has few of them.
        """
        a, steps, groups = self._operators[torch.float64], 0, self.operator.groups

        def smoothed(s: Tensor) -> Tensor:
            if not self.dual:
                return level.inverse.solve(s)
            return (s - a.adjoint(level.inverse.solve(a.apply(s)))) / (damping + level.shift)

        active = torch.arange(len(r), device=r.device)
        converged = torch.zeros(len(r), dtype=torch.bool, device=r.device)
        rho = r - a.apply(x)
        s = a.adjoint(rho) - damping * x
        p, gamma = torch.zeros_like(s), r.new_full((len(r), groups), torch.inf)
        while True:
            done = self._done(rho, s, r[active], x[active], dtype)
            done |= self.largest * norm(x[active]) > limit * norm(r[active])
            converged[active] = done | self._arrived(rho, s, r[active], dtype)
            active, rho, s, p, gamma = (v[~done] for v in (active, rho, s, p, gamma))
            if not len(active) or steps == ITERATIONS:
                return x, steps, converged
            steps += 1
            w = smoothed(s)
            renewed = _dot(s, w, groups)
            p, gamma = w + _scaled(_quotient(renewed, gamma), p), renewed
            q = a.apply(p)
            alpha = _quotient(gamma, _dot(q, q, groups) + damping * _dot(p, p, groups))
            x[active] += _scaled(alpha, p)
            rho = rho - _scaled(alpha, q)
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

    def _level(self, damping: float) -> Level:
        if damping not in self._levels:
            # one damping besides none: κ seldom changes
            self._levels = {0.0: self._levels[0.0]} if 0.0 in self._levels else {}
            self._levels[damping] = self._made(damping)
        return self._levels[damping]

    def _made(self, damping: float) -> Level:
        even = None if damping else equilibrated(self.operator, outputs=self.dual)
        if even is not None:
            try:
                return Even(self._factorized, even, self.largest)
            except NotDefiniteError:
                pass  # it has not full rank, and then only A itself gives the shortest answer
        return Plain(self._factorized, self._operators, self.operator.dtype, self.largest, damping)


def _dot(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """Inner products `(B, groups)` of the groups of two batches."""
    return (a * b).reshape(len(a) * groups, -1).sum(1).reshape(len(a), groups)


def _scaled(factor: Tensor, value: Tensor) -> Tensor:
    """A batch, each of its groups by a factor `(B, groups)`."""
    return (factor[:, :, None] * value.reshape(*factor.shape, -1)).reshape(value.shape)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is: a group that is done takes no more steps."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))
