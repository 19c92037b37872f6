"""f(x) = t, by values of f and gradients: x ← x + s, accelerated.

Anderson's acceleration takes, among the combinations of the last points, the one whose residual is least (Anderson
1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011), and goes on from there: with the residuals r = t − f(x), and with ΔX,
ΔR the last differences of points and of residuals,

    x ← x − ΔX γ + s(r − ΔR γ),   γ = argmin ‖r − ΔR γ‖.

* s(r) = r suits f(x) = x + F(x) with a small F. For an affine f these are the points of GMRES, so that it may converge
  where F is no contraction, too. It costs one evaluation of f.
* s(r) = β Jᵀ r suits any f, for the gradient of the error, too. For an affine f these are the points of CGLS. It costs
  one evaluation and one gradient, where a pair of products with the Jacobian costs several of them.

A sample begins with the former, if its input and output have one shape, and takes the two in turn where those are slow:
either brings directions that the other lacks. Every sample has its own points, its own γ and its own end: it stops
where it has arrived, or where its error falls too slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.jacobian import Jacobian
from fxinvert.linalg.vectors import dot, flat, norm, per_sample

#: differences that are kept, entries of them per sample at most, and steps at most
WINDOW, ENTRIES, STEPS = 20, 2**20, 60
#: steps by the residual alone go on while the error falls by this factor within so many of them
FALL, PATIENCE = 0.5, 3
#: a sample is given up where its error has not fallen by this factor within so many steps …
GRADUAL, LONG = 0.5, 10
#: … and where it has not within so few, once it is small enough
SHORT = 3
#: where no input reaches the target, the error falls to that of the closest
LEAST, SOME = 0.98, 4
#: what is added to the diagonal of the small systems, whose diagonal is 1, in units of the rounding error: differences
#: may be nearly dependent
RIDGE = 10


@dataclass(frozen=True)
class FixedPoint:
    """What the iteration has found, sample by sample.

    Attributes:
        value: `(B, …)`, the point of the least error.
        error: `(B,)`, ‖t − f(x)‖ there.
        evaluations: `(B,)`, of f, while the sample was not done.
    """

    value: Tensor
    error: Tensor
    evaluations: Tensor


def fixed_point(
    function: Callable[[Tensor], Tensor],
    anchor: Tensor,
    output: Tensor,
    target: Tensor,
    goal: Tensor,
    *,
    enough: Tensor | None = None,
    closest: bool = False,
) -> FixedPoint:
    """An input whose output is the target up to `goal`, where the iteration finds one; samples by themselves.

    Args:
        function: f, `(B, …)` → `(B, …)`, samples independent.
        anchor: where to start.
        output: f of the anchor.
        target: t.
        goal: `(B,)`, ‖t − f(x)‖ at which a sample is done; one that is done at the start is not moved.
        enough: `(B,)`, ‖t − f(x)‖ that is worth no more steps, unless these are fast; by default `goal`.
        closest: go on to the input that comes closest to a target which none reaches, by gradients alone.
    """
    search = _Search(function, anchor, output, target, goal, goal if enough is None else enough, closest)
    for _ in range(STEPS):
        if bool(search.done.all()):
            break
        search.step()
    return FixedPoint(search.best, search.least, search.evaluations)


class _Search:
    """All samples, each at its own place."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        anchor: Tensor,
        output: Tensor,
        target: Tensor,
        goal: Tensor,
        enough: Tensor,
        closest: bool,
    ) -> None:
        self.function, self.target, self.closest = function, target, closest
        self.goal, self.enough = goal, enough
        self.alone = closest or anchor.shape != target.shape  # gradients alone
        self.x, self.residual = anchor, target - output
        self.error = norm(self.residual)
        self.best, self.least = anchor, self.error
        self.marks = [self.least]
        self.done = ~(self.error > goal) | ~torch.isfinite(self.error)
        self.evaluations = torch.zeros_like(self.error, dtype=torch.long)
        self.slow = torch.full_like(self.done, self.alone)
        self.since = torch.zeros_like(self.evaluations)  # steps since a sample is slow
        self.length = torch.full_like(self.error, torch.nan)  # β
        self.history = _History(anchor, target)
        self.jacobian: Jacobian | None = None

    def step(self) -> None:
        """One step of every sample that is not done."""
        steep = self._steep
        back, missing = self.history.combined(self.x, self.residual)
        step = missing
        if bool(steep.any()):
            try:
                pulled = self._pulled(missing, steep)
            except SolveError:  # there is no gradient: by values alone, or not at all
                self.done = self.done | steep
                return
            step = pulled if self.alone else torch.where(per_sample(steep, step), pulled, step)
        self.since += self.slow
        self.x = self.x + torch.where(per_sample(self.done, self.x), 0, back + step)
        self.evaluations += ~self.done
        self.jacobian = Jacobian(self.function, self.x) if bool(self._steep.any()) else None
        reached = self.function(self.x) if self.jacobian is None else self.jacobian.output
        self.residual = self.target - reached
        self.error = norm(self.residual)
        better = (self.error < self.least) & ~self.done
        self.best = torch.where(per_sample(better, self.x), self.x, self.best)
        self.least = torch.where(better, self.error, self.least)
        self.marks.append(self.least)
        self._judge()

    @property
    def _steep(self) -> Tensor:
        """The samples whose step is one along the gradient."""
        return self.slow & ~self.done & (self.since % 2 == 0 if not self.alone else True)

    def _pulled(self, missing: Tensor, steep: Tensor) -> Tensor:
        """β Jᵀ r of these samples; β is the best length of their first such step."""
        jacobian = self.jacobian or Jacobian(self.function, self.x)
        pulled = jacobian.adjoint(missing)
        if bool((steep & self.length.isnan()).any()):
            along = dot(pulled, pulled) / norm(jacobian.apply(pulled)).square()
            self.length = torch.where(self.length.isnan() & steep, along.nan_to_num(0, 0, 0), self.length)
        return per_sample(self.length.nan_to_num(), pulled) * pulled

    def _judge(self) -> None:
        """Which samples are done, and which are slow."""
        self.done = self.done | (self.least <= self.goal) | ~torch.isfinite(self.error)
        if self.closest:
            self.done = self.done | self._fell_less(LEAST, SOME)
            return
        near = (self.least <= self.enough) & (self.since > 0)
        self.done = self.done | (near & self._fell_less(FALL, SHORT))
        self.done = self.done | ((self.since >= LONG) & self._fell_less(GRADUAL, LONG))
        self.slow = self.slow | self._fell_less(FALL, PATIENCE)

    def _fell_less(self, factor: float, steps: int) -> Tensor:
        """The samples whose error has not fallen by a factor within so many steps."""
        if len(self.marks) <= steps:
            return torch.zeros_like(self.done)
        return self.least > factor * self.marks[-1 - steps]


class _History:
    """The last differences of points and of residuals, in a ring: `(B, k, n)`, with the Gram matrix of the latter."""

    def __init__(self, x: Tensor, residual: Tensor) -> None:
        rows, entries = len(x), flat(x).shape[1] + flat(residual).shape[1]
        self._size = max(2, min(WINDOW, ENTRIES // max(1, entries)))
        self._moved = flat(x).new_zeros(rows, self._size, flat(x).shape[1])
        self._changed = flat(residual).new_zeros(rows, self._size, flat(residual).shape[1])
        self._gram = self._moved.new_zeros(rows, self._size, self._size, dtype=torch.float64)
        self._last: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def combined(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """−ΔX γ and r − ΔR γ, the newest point and residual taken into the history."""
        point, r = flat(x), flat(residual)
        last, self._last = self._last, (point, r)
        if last is None:
            return torch.zeros_like(x), residual
        at, changed = self._count % self._size, r - last[1]
        self._count += 1
        known = min(self._count, self._size)
        self._moved[:, at], self._changed[:, at] = point - last[0], changed
        moved, differences = self._moved[:, :known], self._changed[:, :known]
        # a row times a matrix is several times faster than a matrix times a column
        line, right = ((v[:, None] @ differences.mT)[:, 0].double() for v in (changed, r))
        self._gram[:, at, :known] = self._gram[:, :known, at] = line
        weights = _least_squares(self._gram[:, :known, :known], right, torch.finfo(r.dtype).eps)
        weights = -weights.to(r.dtype)[:, None]
        back, missing = weights @ moved, weights @ differences
        return back.reshape(x.shape), residual + missing.reshape(residual.shape)


def _least_squares(gram: Tensor, known: Tensor, eps: float) -> Tensor:
    """G⁻¹ b, `(B, k)`; differences of very different lengths are compared by their directions."""
    scale = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, 1)
    gram = torch.nan_to_num(gram / scale[:, :, None] / scale[:, None, :], 0, 0, 0)
    known = torch.nan_to_num(known / scale, 0, 0, 0)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights: Tensor = torch.linalg.solve(gram + RIDGE * eps * identity, known) / scale
    return weights
