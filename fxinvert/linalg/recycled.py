"""Conjugate directions that outlive the system that they were made for.

Gauss–Newton solves a sequence of systems whose Jacobians differ little. The directions of one solve, p = Jᵀu with q = J p
mutually orthogonal, are a pseudo-inverse of J on the space that they span:

    A⁺ r ≈ Σ p ⟨q, r⟩ / ⟨q, q⟩.

On the next system it costs no product and leaves of the residual what J has changed, and what was not in that space;
for the latter new directions are made, orthogonal to the old ones (subspace recycling, as for sequences of linear
systems: Parks et al., SIAM J. Sci. Comput. 28, 2006; the recurrence is that of GCR, Eisenstat, Elman & Schultz 1983).
With nothing to recycle this is CGLS with complete orthogonalization: against all directions at once, and once again, for
what rounding has left (twice is enough: Giraud, Langou & Rozloznik, Comput. Math. Appl. 50, 2005).

Where r is out of reach the residual stays large, and its slope falls slowly. A system that is only a model of a function is
then solved no further than iterations do nearly as much as those before (Nash & Sofer, Oper. Res. Lett. 9, 1990).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.solvers import Gradients
from fxinvert.linalg.vectors import dot, flat, per_sample

#: most directions that are kept, and most entries of them per sample
DIRECTIONS, ENTRIES = 48, 2**20
#: of what iterations have taken off the squared residual on average: what one must, for another to be worth it
WORTHWHILE = 0.2


class Directions:
    """p `(B, k, n)`, u and q `(B, k, m)` of every sample, and ⟨q, q⟩ `(B, k)`, 0 where a sample has none.

    Args:
        like: `(B, …)`, of the same dtype.
        n, m: entries of inputs and outputs.
    """

    def __init__(self, like: Tensor, n: int, m: int) -> None:
        self._room, self._added = max(2, min(DIRECTIONS, ENTRIES // max(1, n + 2 * m))), 0
        self._kept = [like.new_zeros(len(like), 0, size) for size in (n, m, m)]
        self._square = like.new_zeros(len(like), 0)

    def forget(self, rows: Tensor) -> None:
        """Drops those of some samples, `(B,)`."""
        self._square[rows] = 0

    def shares(self, value: Tensor) -> Tensor:
        """⟨q, v⟩ / ⟨q, q⟩ for v `(B, …)`: `(B, k)`."""
        # a row times a matrix is twice as fast as a matrix times a column
        found = (flat(value)[:, None] @ self._kept[2].mT)[:, 0]
        return torch.where(self._square > 0, found / torch.where(self._square > 0, self._square, 1), 0)

    def along(self, shares: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """The sums of the p, u and q by shares `(B, k)`, as long as there are values, of whose shapes they are."""
        kept = zip(self._kept[-len(values) :], values, strict=True)
        return [(shares[:, None] @ own).reshape(value.shape) for own, value in kept]

    def add(self, direction: Sequence[Tensor], square: Tensor) -> None:
        """Takes p, u and q in, in the place of the oldest if there is no more room."""
        place, held = self._added % self._room, self._square.shape[1]
        if place == held:
            more = min(max(held, 2), self._room - held)
            self._kept = [
                torch.cat([own, own.new_zeros(len(own), more, own.shape[2])], 1) for own in self._kept
            ]
            self._square = torch.cat([self._square, square.new_zeros(len(square), more)], 1)
        for own, value in zip(self._kept, direction, strict=True):
            own[:, place] = flat(value)
        self._square[:, place], self._added = square, self._added + 1


class Recycled:
    """Solves the systems of a sequence, undamped, every sample by itself.

    Attributes:
        known: `(B,)`, the samples that have directions of earlier systems.
    """

    def __init__(self, rows: Tensor) -> None:
        """Nothing is known at first; `rows` is `(B,)`, on the device of the samples."""
        self._kept: Directions | None = None
        self.known = torch.zeros_like(rows, dtype=torch.bool)

    def forget(self, rows: Tensor) -> None:
        """Drops what is known of some samples, `(B,)`."""
        if self._kept is not None:
            self._kept.forget(rows)
        self.known = self.known & ~rows

    def solve(
        self,
        operator: LinearOperator,
        r: Tensor,
        *,
        largest: Tensor,
        tolerance: float,
        small_enough: Tensor,
        limit: Tensor,
        slope: Tensor,
        skip: Tensor,
        brief: Tensor | bool = False,
    ) -> Gradients:
        """A⁺ r; arguments and result as for `cgls`, but that the slope is infinite, not known, where it recycles.

        Args:
            brief: `(B,)`, where iterations end once they do much less than those before.
        """
        x = torch.zeros(len(r), *operator.in_shape, dtype=r.dtype, device=r.device)
        if self._kept is None:
            self._kept = Directions(r, math.prod(x.shape[1:]), math.prod(r.shape[1:]))
        kept = self._kept
        x, dual, q = kept.along(torch.where(skip[:, None], 0, kept.shares(r)), (x, r, r))
        residual = r - q
        iterations = torch.zeros(len(r), dtype=torch.long, device=r.device)
        start = torch.full_like(small_enough, torch.inf)
        size, removed = dot(residual, residual).sqrt(), torch.zeros_like(small_enough)
        converged = skip | ~torch.isfinite(size) | (size <= small_enough)
        eps = torch.finfo(r.dtype).eps
        while not bool((converged | (iterations >= limit)).all()):
            idle = converged | (iterations >= limit)
            s = operator.adjoint(residual)
            steep = dot(s, s).sqrt()
            start = torch.where(~idle & torch.isinf(start), steep, start)
            converged = converged | ~torch.isfinite(steep) | (steep <= tolerance * largest * size)
            converged = converged | (steep <= start * slope) | (steep == 0)
            idle = idle | converged
            iterations = iterations + ~idle
            if bool(idle.all()):
                break
            p, u, q = s, residual, operator.apply(s)
            length = dot(q, q)
            largest = torch.where(
                idle, largest, torch.maximum(largest, length.sqrt() / torch.where(idle, 1, steep))
            )
            shares = kept.shares(q)
            again = kept.shares(q - kept.along(shares, [q])[0])
            p, u, q = (
                v - own for v, own in zip((p, u, q), kept.along(shares + again, (p, u, q)), strict=True)
            )
            square = dot(q, q)
            # nothing but rounding is left of it
            spent = square <= (100 * eps) ** 2 * length
            square = torch.where(idle | spent, 0, square)
            kept.add((p, u, q), square)
            share = torch.where(square > 0, dot(q, residual) / torch.where(square > 0, square, 1), 0)
            x, dual, residual = _along(x, share, p), _along(dual, share, u), _along(residual, -share, q)
            size = torch.where(idle, size, dot(residual, residual).sqrt())
            gained = share.square() * square
            removed = removed + gained
            spent |= brief & (iterations * gained <= WORTHWHILE * removed)
            converged = converged | (~idle & (spent | (size <= small_enough)))
        slope_known = torch.where(self.known, torch.inf, start)
        self.known = self.known | (iterations > 0)
        return Gradients(x, dual, iterations, converged, slope_known, largest)


def _along(value: Tensor, share: Tensor, direction: Tensor) -> Tensor:
    return value + per_sample(share, value) * direction
