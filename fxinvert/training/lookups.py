"""Normal equations of a table of which rows are looked up, y = W[i]: G is diagonal, and every row a problem of its own.

With ã the unit vector of the index, G = Σ w ã ãᵀ has the weights of a row's occurrences on its diagonal, and row v of C is
the sum of its errors, so that

    ΔW_v = Σ_{i=v} w (t − y) / (Σ_{i=v} w + ρ·mean(diag G)).

A row that never occurs has nothing to say, and stays; so does the row of the padding, which torch does not train either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fxinvert.training.statistics import Metric, Solved


@dataclass
class LookupEquations:
    """The diagonal of G `(n,)` and C `(m, n)` in float64, the rows counted, and the squared error Σ w (t − y)²."""

    diagonal: Tensor
    cross: Tensor
    rows: int
    error: float

    @classmethod
    def of(
        cls, indices: Tensor, count: int, errors: Tensor, weights: Tensor, padding: int = -1
    ) -> LookupEquations:
        """The sums over some rows.

        Args:
            indices: int64, as many as rows, of any shape.
            count: n, rows of the table.
            errors: t − y, `(1, rows, m)`.
            weights: `(B,)`; each stands for `rows / B` consecutive rows.
            padding: the index whose row stays; negative: none.
        """
        flat = indices.reshape(-1)
        each = weights.double().repeat_interleave(len(flat) // max(len(weights), 1))[:, None]
        missing = errors[0].double()
        # what is added at an index is added in the same order every time, on a GPU too
        diagonal, cross = (
            torch.ops.aten.embedding_dense_backward(value, flat, count, padding, False)
            for value in (each, missing * each)
        )
        return cls(diagonal[:, 0], cross.mT, len(flat), float((missing.square() * each).sum()))

    @property
    def nbytes(self) -> int:
        return self.diagonal.nbytes + self.cross.nbytes

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.diagonal).all() & torch.isfinite(self.cross).all())

    def __iadd__(self, other: LookupEquations) -> Self:
        self.diagonal += other.diagonal
        self.cross += other.cross
        self.rows += other.rows
        self.error += other.error
        return self

    def answered(self) -> LookupEquations:
        """The sums over the same rows, errors of zero."""
        return replace(self, cross=torch.zeros_like(self.cross), error=0.0)

    def solve(self, damping: float) -> Solved:
        """ΔΘ with relative damping ρ = `damping`."""
        dead = self.diagonal <= 0
        ridge = torch.where(dead, 1.0, self.diagonal + damping * self.diagonal.mean())
        change = torch.where(dead, 0.0, self.cross / ridge)
        explained = float((2 * change * self.cross - change.square() * self.diagonal).sum())
        return Solved(
            change=change[None],
            damping=damping,
            explained=explained / self.error if self.error > 0 else 0.0,
            dead=int(dead.sum()),
        )

    def metric(self, damping: float) -> Metric:
        """Of G + λI."""
        damped = self.diagonal + damping * self.diagonal.mean()
        return Metric(lambda x: x * damped, lambda x: x / torch.where(damped > 0, damped, 1))
