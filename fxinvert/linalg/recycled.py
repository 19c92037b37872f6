"""Conjugate directions that outlive the system that they were made for.

Gauss–Newton solves a sequence of systems whose Jacobians differ little. The directions of one solve, p = Jᵀu with q = J p
mutually orthogonal, are a pseudo-inverse of J on the space that they span:

    A⁺ r ≈ Σ p ⟨q, r⟩ / ⟨q, q⟩.

On the next system it costs no product and leaves of the residual what J has changed, and what was not in that space;
for the latter new directions are made, orthogonal to the old ones (subspace recycling, as for sequences of linear
systems: Parks et al., SIAM J. Sci. Comput. 28, 2006; the recurrence is that of GCR, Eisenstat, Elman & Schultz 1983).
With nothing to recycle this is CGLS with complete orthogonalization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.solvers import Gradients
from fxinvert.linalg.vectors import dot, per_sample

#: most directions that are kept, and most entries of them per sample
DIRECTIONS, ENTRIES = 48, 2**20


class Direction(NamedTuple):
    """p `(B, *in_shape)`, u and q `(B, *out_shape)`, and ⟨q, q⟩ `(B,)`, 0 where a sample has none."""

    p: Tensor
    u: Tensor
    q: Tensor
    square: Tensor

    def share(self, r: Tensor) -> Tensor:
        """⟨q, r⟩ / ⟨q, q⟩."""
        return torch.where(self.square > 0, dot(self.q, r) / torch.where(self.square > 0, self.square, 1), 0)


class Recycled:
    """Solves the systems of a sequence, undamped, every sample by itself.

    Attributes:
        known: `(B,)`, the samples that have directions of earlier systems.
    """

    def __init__(self, rows: Tensor) -> None:
        """Nothing is known at first; `rows` is `(B,)`, on the device of the samples."""
        self._kept: list[Direction] = []
        self.known = torch.zeros_like(rows, dtype=torch.bool)

    def forget(self, rows: Tensor) -> None:
        """Drops what is known of some samples, `(B,)`."""
        self._kept = [d._replace(square=torch.where(rows, 0, d.square)) for d in self._kept]
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
    ) -> Gradients:
        """A⁺ r; arguments and result as for `cgls`, but that the slope is infinite, not known, where it recycles."""
        x = torch.zeros(len(r), *operator.in_shape, dtype=r.dtype, device=r.device)
        dual, residual = torch.zeros_like(r), r
        for known in self._kept:
            share = torch.where(skip, 0, known.share(residual))
            x, dual, residual = (
                _along(x, share, known.p),
                _along(dual, share, known.u),
                _along(residual, -share, known.q),
            )
        iterations = torch.zeros(len(r), dtype=torch.long, device=r.device)
        start = torch.full_like(small_enough, torch.inf)
        size = dot(residual, residual).sqrt()
        converged = skip | ~torch.isfinite(size) | (size <= small_enough)
        room = max(2, min(DIRECTIONS, ENTRIES // max(1, x[:1].numel() + 2 * r[:1].numel())))
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
            for known in self._kept:
                share = known.share(q)
                p, u, q = _along(p, -share, known.p), _along(u, -share, known.u), _along(q, -share, known.q)
            square = dot(q, q)
            # nothing but rounding is left of it
            spent = square <= (100 * eps) ** 2 * length
            made = Direction(p, u, q, torch.where(idle | spent, 0, square))
            share = made.share(residual)
            x, dual, residual = _along(x, share, p), _along(dual, share, u), _along(residual, -share, q)
            self._kept = [*self._kept[1 - room :], made]
            size = torch.where(idle, size, dot(residual, residual).sqrt())
            converged = converged | (~idle & (spent | (size <= small_enough)))
        slope_known = torch.where(self.known, torch.inf, start)
        self.known = self.known | (iterations > 0)
        return Gradients(x, dual, iterations, converged, slope_known, largest)


def _along(value: Tensor, share: Tensor, direction: Tensor) -> Tensor:
    return value + per_sample(share, value) * direction
