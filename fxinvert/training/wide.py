"""Normal equations of ops with so many features that their Gram matrix would not fit: from the rows themselves.

With the rows B = √w ã of N samples, G = BᵀB and the solution is found on the samples' side, whose matrix is N × N:

    ΔΘ = C (BᵀB + λI)⁻¹ = (C − C Bᵀ (BBᵀ + λI)⁻¹ B) / λ.

That is exact as long as rows can be kept. Where there are more, they are replaced by fewer that have nearly the same Gram
matrix: B = U S Vᵀ, of which √(S² − δI) Vᵀ is kept, δ the first square that is left out (frequent directions: Liberty, KDD
2013), and δ/2 is added to λ for what is missing (Luo et al., JMLR 20, 2019). So memory is bounded, whatever the number of samples;
C is a plain sum, as ever. What is kept depends on the order of sums only, which is that of chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fxinvert.errors import REPORT
from fxinvert.training.budget import MOST
from fxinvert.training.statistics import Solved

#: the least relative damping: the formula divides by it
LEAST = 1e-6


@dataclass
class WideEquations:
    """What normal equations are made of where features outnumber what a Gram matrix can be held for, in float64.

    Attributes:
        factor: B `(groups, r, n)`, with BᵀB ≈ Σ w ã ãᵀ.
        missing: `(groups,)`, what BᵀB lacks on average in the directions that were left out, δ/2 summed.
        squares: `(groups,)`, Σ w ‖ã‖², the trace of the Gram matrix.
        cross: C `(groups, m, n)`.
        rows: samples counted.
        error: Σ w (t − y)².
        kept: so many rows are kept; up to twice as many are held before they are reduced.
    """

    factor: Tensor
    missing: Tensor
    squares: Tensor
    cross: Tensor
    rows: int
    error: float
    kept: int = MOST

    @classmethod
    def of(cls, features: Tensor, errors: Tensor, weights: Tensor, *, kept: int = MOST) -> WideEquations:
        """The sums over some rows; arguments as for `NormalEquations.of`, and how many rows are kept."""
        return cls.over([features], errors, weights, kept)

    @classmethod
    def over(
        cls, features: Iterable[Tensor], errors: Tensor, weights: Tensor, kept: int = MOST
    ) -> WideEquations:
        """The same of features that come in parts of the rows, one at least."""
        rows = errors.shape[1]
        per_row = weights.double().repeat_interleave(rows // max(len(weights), 1))[None, :, None]
        total: WideEquations | None = None
        first = 0
        for own in (some for part in features for some in torch.split(part, kept, 1)):
            part = slice(first, first + own.shape[1])
            root = per_row[:, part].sqrt()
            factor, error = own * root, errors[:, part] * root
            squares = factor.square().sum((1, 2))
            cross, left = error.mT @ factor, float(error.square().sum())
            new = cls(factor, torch.zeros_like(squares), squares, cross, own.shape[1], left, kept)
            if total is None:
                total = new
            else:
                total += new
            first = part.stop
        assert total is not None, f"no rows at all. {REPORT}"
        return total

    @property
    def nbytes(self) -> int:
        return self.factor.nbytes + self.cross.nbytes

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.squares).all() & torch.isfinite(self.cross).all())

    def __iadd__(self, other: WideEquations) -> Self:
        self.factor = torch.cat([self.factor, other.factor], 1)
        self.missing += other.missing
        if self.factor.shape[1] > 2 * self.kept:
            self.factor, more = _reduced(self.factor, self.kept)
            self.missing += more
        self.squares += other.squares
        self.cross += other.cross
        self.rows += other.rows
        self.error += other.error
        return self

    def solve(self, damping: float) -> Solved:
        """ΔΘ with relative damping ρ = `damping`, at least 1e-6."""
        used, n = max(damping, LEAST), self.factor.shape[2]
        ridge = used * self.squares / n + self.missing
        ridge = torch.where(ridge > 0, ridge, 1.0)[:, None, None]
        kernel = self.factor @ self.factor.mT
        kernel.diagonal(dim1=1, dim2=2).add_(ridge[..., 0])
        seen = torch.cholesky_solve(self.factor @ self.cross.mT, torch.linalg.cholesky(kernel)).mT
        change = (self.cross - seen @ self.factor) / ridge
        # 2⟨ΔΘ, C⟩ − ‖ΔΘ Bᵀ‖², where ΔΘ BᵀB is C − λ ΔΘ
        explained = float((change * (self.cross + change * ridge)).sum())
        return Solved(
            change=change,
            damping=used,
            explained=explained / self.error if self.error > 0 else 0.0,
            dead=int((self.factor == 0).all(1).sum()),
        )


def _reduced(factor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`(groups, r, n)` → `(groups, count, n)` with nearly the same Gram matrix, and half of what it lacks at most."""
    squares, vectors = torch.linalg.eigh(factor @ factor.mT)
    kept, cut = squares[:, -count:], squares[:, -count - 1].clamp(min=0)
    gains = ((kept - cut[:, None]).clamp(min=0) / kept.clamp(min=torch.finfo(kept.dtype).tiny)).sqrt()
    return (vectors[..., -count:] * gains[:, None]).mT @ factor, cut / 2
