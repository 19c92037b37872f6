"""Batched conjugate gradients for operators that no factorization fits, every sample on its own.

Without a preconditioner they go by the normal equations (CGLS, Björck 1996, §7.4): started at zero they converge to the
least-squares solution of least norm, whatever the rank. A preconditioner stands for the inverse of the smaller Gram matrix
K, and the system is solved on that side, with x = Aᵀy where K = AAᵀ, so that x is the shortest solution there, too; where K
is singular and no x reaches r, that diverges, which is noticed.

The recurrences run in the operator's dtype. Their residual drifts from the true one, so that this is computed anew, in
float64, when a sample seems to be done: it is then done indeed, or goes on from there (iterative refinement). Samples that
the preconditioner brings no further go on without it, and those that nothing brings further have not converged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.solvers import ARRIVED, RANGE, REFINED, Factor, Solution
from fxinvert.linalg.vectors import dot, norm, per_sample

#: what a round has to bring the slope down to, for another one to be worth it
WORTHWHILE = 0.5
#: by how much a residual may exceed the least so far, before it is going to diverge
DIVERGED = 1e3
#: iterations after which an error must be on its way: it would arrive if it went on falling so many times as fast
EARLY, HASTE = 50, 2.0


class Preconditioner(Protocol):
    """M, a positive definite matrix near the inverse of AAᵀ or AᵀA, whichever is smaller."""

    @property
    def nbytes(self) -> int: ...

    def solve(self, value: Tensor) -> Tensor:
        """M v for every row."""


class IterativeFactor(Factor):
    """Nothing is factorized: every solve iterates.

    Args:
        operator: A.
        iterations: limit on the products with A, and on those with Aᵀ.
        preconditioner: M; None for none.
    """

    def __init__(
        self, operator: LinearOperator, iterations: int, preconditioner: Preconditioner | None = None
    ) -> None:
        super().__init__(operator)
        self.limit, self.preconditioner = iterations, preconditioner
        #: of AAᵀ + λI, whose condition is κ² + 1, the error falls below 2 exp(−2k/κ) in k steps (Saad 2003, §6.11.3)
        self.manageable = max(2 * iterations / math.log(2 / ARRIVED[operator.dtype]), 1.0)
        self.largest = operator.norm()
        self._exact = operator.to(torch.float64)
        #: what recurrences run with
        self._quick = operator if 1 / RANGE <= self.largest <= RANGE else self._exact

    @property
    def nbytes(self) -> int:
        return 0 if self.preconditioner is None else self.preconditioner.nbytes

    def explain(self) -> str:
        name = type(self.preconditioner).__name__.lower()
        by = "" if self.preconditioner is None else f", preconditioned by a {name}"
        return f"conjugate gradients on the normal equations{by}, at most {self.limit} iterations"

    def solve(self, r: Tensor, damping: float, limit: float = math.inf) -> Solution:
        found = _Found(
            torch.zeros(len(r), *self.operator.in_shape, dtype=torch.float64, device=r.device),
            torch.zeros_like(r, dtype=torch.float64),
            torch.zeros(len(r), dtype=torch.long, device=r.device),
        )
        converged = torch.zeros(len(r), dtype=torch.bool, device=r.device)
        size = norm(r.double())
        unit = r.double() / per_sample(torch.where(size > 0, size, 1), r)
        # with so much damping plain iterations converge, and cost least
        plain = damping >= (self.largest / self.manageable) ** 2
        for preconditioner in dict.fromkeys((None if plain else self.preconditioner, None)):
            waiting = (~converged).nonzero()[:, 0]
            converged[waiting] = self._refined(found, unit, waiting, preconditioner, damping, limit, r.dtype)
        x = (found.x * per_sample(size, r)).to(r.dtype)
        return Solution(x, int(found.steps.max()) if len(r) else 0, converged)

    def _refined(
        self,
        found: _Found,
        r: Tensor,
        rows: Tensor,
        preconditioner: Preconditioner | None,
        damping: float,
        limit: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Goes on with some rows from their true residuals as long as it is worth it; which of them converged."""
        a, tolerance, arrived = self._exact, REFINED[dtype], ARRIVED[dtype]
        converged = torch.zeros_like(rows, dtype=torch.bool)
        active = torch.arange(len(rows), device=rows.device)
        size, slope = (
            norm(r[rows]),
            torch.full((len(rows),), torch.inf, dtype=torch.float64, device=r.device),
        )
        tried = found.of(rows)
        while len(active):
            rho = r[rows[active]] - a.apply(tried.x)
            renewed, left = norm(a.adjoint(rho) - damping * tried.x), norm(rho)
            # a row that is not finite has no solution; of others no step may lead beyond what there are numbers for
            better = (renewed < slope) | ~torch.isfinite(size)
            found.put(rows[active], better, tried)
            steep, far = renewed / (self.largest * left), left / size
            ended = ~((steep > tolerance) & (far > tolerance)) | (self.largest * norm(tried.x) > limit * size)
            converged[active] |= better & (ended | (steep <= arrived) | (far <= arrived))
            going = better & ~ended & (renewed <= WORTHWHILE * slope) & (tried.steps < self.limit)
            active, slope, rho, size = (v[going] for v in (active, renewed, rho, size))
            if len(active):
                task = _Task(rho, found.of(rows[active]), size, limit * size)
                tried = self._descended(task, preconditioner, damping)
        return converged

    def _descended(self, task: _Task, preconditioner: Preconditioner | None, damping: float) -> _Found:
        """Conjugate gradients on AAᵀ + λI or AᵀA + λI, each row until its own recurrence says that it is done."""
        a, (m, n) = self._quick, self.operator.size
        dual = preconditioner is not None and m <= n
        enough = REFINED[self.operator.dtype] / 2  # true residuals are a little larger

        def missing(rho: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return rho - damping * y if dual else a.adjoint(rho) - damping * x

        result = task.start
        rows = torch.arange(len(task.rho), device=task.rho.device)
        rho, x0, y0, size, longest = (
            v.to(a.dtype) for v in (task.rho, result.x, result.y, task.size, task.longest)
        )
        x, y, steps, least = torch.zeros_like(x0), torch.zeros_like(y0), result.steps, norm(rho)
        begun, nearest = steps, torch.ones_like(least)
        g = missing(rho, x0, y0)
        w = g if preconditioner is None else preconditioner.solve(g)
        p, gamma = w, dot(g, w)
        while True:
            error, left = norm(g) / (1 if dual else self.largest), norm(rho)
            least = torch.minimum(least, left)
            going = (error > enough * left) & (left > enough * size) & (left <= DIVERGED * least)
            going &= (gamma > 0) & (steps < self.limit) & (self.largest * norm(x0 + x) <= longest)
            nearest = torch.minimum(nearest, torch.minimum(error / left, left / size))
            going &= self._on_its_way(steps, begun, nearest)
            if not bool(going.all()):
                result.add(rows, ~going, x, y, steps)
                kept = (rows, rho, x0, y0, size, longest, x, y, steps, begun, least, nearest, p, gamma)
                rows, rho, x0, y0, size, longest, x, y, steps, begun, least, nearest, p, gamma = (
                    v[going] for v in kept
                )
                if not len(rows):
                    return result
            steps = steps + 1
            t = a.adjoint(p) if dual else p
            q = a.apply(t)
            alpha = gamma / ((dot(t, t) if dual else dot(q, q)) + damping * dot(p, p))
            x, rho = x + per_sample(alpha, t) * t, rho - per_sample(alpha, q) * q
            y = y + per_sample(alpha, p) * p if dual else y
            g = missing(rho, x0 + x, y0 + y)
            w = g if preconditioner is None else preconditioner.solve(g)
            renewed = dot(g, w)
            p, gamma = w + per_sample(renewed / gamma, p) * p, renewed

    def _on_its_way(self, steps: Tensor, begun: Tensor, nearest: Tensor) -> Tensor:
        """Whether relative errors, that have been so small since some step, may yet arrive within the iterations that are left."""
        done = steps - begun
        foreseen = HASTE * (self.limit - begun) / done.clamp(min=1) * nearest.log()
        return (done < EARLY) | (foreseen <= math.log(ARRIVED[self.operator.dtype]))


class _Task(NamedTuple):
    """Residuals r − A x to go on from, what has been found, the norms of r, and what σ_max‖x‖ may be."""

    rho: Tensor
    start: _Found
    size: Tensor
    longest: Tensor


@dataclass
class _Found:
    """Corrections x in float64, what they are Aᵀy of where that is known, and iterations, row by row."""

    x: Tensor
    y: Tensor
    steps: Tensor

    def of(self, rows: Tensor) -> _Found:
        """A copy of some rows."""
        return _Found(self.x[rows], self.y[rows], self.steps[rows])

    def put(self, rows: Tensor, better: Tensor, other: _Found) -> None:
        """Takes over some rows where they are better; iterations are counted anyhow."""
        self.x[rows[better]] = other.x[better]
        self.y[rows[better]] = other.y[better]
        self.steps[rows] = other.steps

    def add(self, rows: Tensor, done: Tensor, x: Tensor, y: Tensor, steps: Tensor) -> None:
        """Adds what was found for those rows that are done."""
        self.x[rows[done]] += x[done]
        self.y[rows[done]] += y[done]
        self.steps[rows[done]] = steps[done]
