"""Normal equations of one affine op: sums over samples, and their solution.

For y = Θ ã the weighted least-squares change of Θ towards the targets t is

    ΔΘ = C (G + ρ·mean(diag G)·I)⁻¹,   G = Σ w ã ãᵀ,  C = Σ w (t − y) ãᵀ.

G and C are plain sums: they stream in fixed memory, and add up across batches, chunks and machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fxinvert.errors import REPORT
from fxinvert.linalg.memory import waits
from fxinvert.training.grams import Products, Shifts, gram, product, products


@dataclass
class NormalEquations:
    """G `(groups, n, n)` and C `(groups, m, n)` in float64, the samples counted, and the squared error Σ w (t − y)²."""

    gram: Tensor
    cross: Tensor
    rows: int
    error: float

    @classmethod
    def of(cls, features: Tensor, errors: Tensor, weights: Tensor) -> NormalEquations:
        """The sums over some rows: products in the dtype of the features, sums of them in float64.

        Args:
            features: ã, `(groups, rows, n)`.
            errors: t − y, `(groups, rows, m)`.
            weights: of the samples, `(B,)`; each stands for `rows / B` consecutive rows.
        """
        return cls.over([features], errors, weights)

    @classmethod
    def over(
        cls, features: Iterable[Tensor], errors: Tensor, weights: Tensor, shifts: Shifts | None = None
    ) -> NormalEquations:
        """The same of features that come in parts of the rows, one at least.

        Args:
            features, errors, weights: see `of`.
            shifts: the structure of patches, by which G is found where that is cheaper.
        """
        rows = errors.shape[1]
        per_row = weights.repeat_interleave(rows // max(len(weights), 1))[None, :, None]
        alike = not waits(weights) and bool((weights == weights[:1]).all())
        found: Products = None
        cross, first = None, 0
        for own in features:
            part = slice(first, first + own.shape[1])
            weighted = own if alike else own * per_row[:, part]
            cross = product(errors[:, part].mT, weighted.mT, onto=cross)
            if shifts is not None and not shifts.pay(own.shape[2], rows):
                shifts = None
            found, first = products(own, weighted, shifts, found), part.stop
        assert cross is not None, f"no rows at all. {REPORT}"
        made = cls(
            gram(found, shifts), cross, rows, float((errors.square() * per_row).sum(dtype=torch.float64))
        )
        if alike and rows:
            made.gram *= weights[0]
            made.cross *= weights[0]
        return made

    @property
    def nbytes(self) -> int:
        return self.gram.nbytes + self.cross.nbytes

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.gram).all() & torch.isfinite(self.cross).all())

    def __iadd__(self, other: NormalEquations) -> Self:
        self.gram += other.gram
        self.cross += other.cross
        self.rows += other.rows
        self.error += other.error
        return self

    def answered(self) -> NormalEquations:
        """The sums over the same rows, errors of zero."""
        return replace(self, cross=torch.zeros_like(self.cross), error=0.0)

    def solve(self, damping: float) -> Solved:
        """ΔΘ with relative damping ρ = `damping`, raised tenfold as long as the system is not positive definite.

        A feature that is always zero (a dead column) has nothing to say about its weights: they stay as they are.
        """
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        dead = diagonal <= 0
        mean = diagonal.mean(1, keepdim=True)
        used = damping
        factor, failed = torch.empty_like(self.gram).mT, dead.new_empty(len(dead), dtype=torch.int32)
        while True:
            factor.copy_(self.gram)
            ridge = torch.where(dead, 1.0, used * mean)
            factor.diagonal(dim1=1, dim2=2).add_(ridge)
            torch.linalg.cholesky_ex(factor, out=(factor, failed))  # in its own place: columns are contiguous
            if not bool(failed.any()):
                break
            used = max(10 * used, torch.finfo(torch.float64).eps)
        half = torch.linalg.solve_triangular(factor, self.cross.mT, upper=False)
        change = torch.linalg.solve_triangular(factor.mT, half, upper=True).mT
        # 2⟨ΔΘ, C⟩ − ⟨ΔΘ G, ΔΘ⟩, where ΔΘ G is C − ΔΘ Λ
        explained = float((change * (self.cross + change * ridge[:, None])).sum())
        return Solved(
            change=torch.where(dead[:, None, :], 0.0, change),
            damping=used,
            explained=explained / self.error if self.error > 0 else 0.0,
            dead=int(dead.sum()),
        )

    def metric(self, damping: float) -> Metric:
        """Of G + λI, for relative damping as it was used."""
        mean = self.gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(self.gram.shape[2], dtype=self.gram.dtype, device=self.gram.device)
        damped = self.gram + damping * torch.where(mean > 0, mean, 1) * eye
        root = torch.linalg.cholesky(damped)
        return Metric(lambda x: x @ damped, lambda x: torch.cholesky_solve(x.mT, root).mT)


@dataclass(frozen=True)
class Metric:
    """What a change X `(groups, m, n)` of Θ does to the outputs: ⟨X S, X⟩ for S = G + λI.

    Attributes:
        times: X → X S.
        divided: X → X S⁻¹.
    """

    times: Callable[[Tensor], Tensor]
    divided: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solved:
    """A solution of normal equations.

    Attributes:
        change: ΔΘ `(groups, m, n)`, float64.
        damping: the ρ that was used.
        explained: the share of the squared error that the full change removes.
        dead: number of features that are always zero.
    """

    change: Tensor
    damping: float
    explained: float
    dead: int
