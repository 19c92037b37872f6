"""Normal equations of ops with so many features that their Gram matrix would not fit: from the rows themselves.

With the rows B = √w ã of N samples, G = BᵀB and the solution is found on the samples' side, whose matrix is N × N:

    ΔΘ = C (BᵀB + λI)⁻¹ = Eᵀ (BBᵀ + λI)⁻¹ B,   C = EᵀB,   E = √w (t − y),

where neither G nor C is ever held. That is exact as long as rows can be kept. Where there are more, they are replaced by
fewer that have nearly the same Gram matrix: B = U S Vᵀ, of which √(S² − δI) Vᵀ is kept, δ the first square that is left out
(frequent directions: Liberty, KDD 2013), and δ/2 is added to λ for what is missing (Luo et al., JMLR 20, 2019). So memory is
bounded, whatever the number of samples. From then on C is held, a plain sum as ever, and

    ΔΘ = (C − C Bᵀ (BBᵀ + λI)⁻¹ B) / λ.

What is kept depends on the order of sums only, which is that of chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fxinvert.errors import REPORT
from fxinvert.training.budget import MOST
from fxinvert.training.statistics import Metric, Solved

#: the least relative damping: the formula divides by it
LEAST = 1e-6


@dataclass
class WideEquations:
    """What normal equations are made of where features outnumber what a Gram matrix can be held for, in float64.

    Attributes:
        factor: B `(groups, r, n)`, with BᵀB ≈ Σ w ã ãᵀ.
        missing: `(groups,)`, what BᵀB lacks on average in the directions that were left out, δ/2 summed.
        squares: `(groups,)`, Σ w ‖ã‖², the trace of the Gram matrix.
        errors: E `(groups, r, m)` as long as all rows are kept; None: C is held.
        held: C `(groups, m, n)`, which is EᵀB as long as it is not held.
        rows: samples counted.
        error: Σ w (t − y)².
        kept: so many rows are kept; up to twice as many are held before they are reduced.
    """

    factor: Tensor
    missing: Tensor
    squares: Tensor
    errors: Tensor | None
    held: Tensor | None
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
            left = float(error.square().sum())
            new = cls(factor, torch.zeros_like(squares), squares, error, None, own.shape[1], left, kept)
            if total is None:
                total = new
            else:
                total += new
            first = part.stop
        assert total is not None, f"no rows at all. {REPORT}"
        return total

    @property
    def cross(self) -> Tensor:
        """C `(groups, m, n)`."""
        if self.held is not None:
            return self.held
        assert self.errors is not None, f"neither C nor the errors that it is made of. {REPORT}"
        return self.errors.mT @ self.factor

    @property
    def nbytes(self) -> int:
        return self.factor.nbytes + sum(own.nbytes for own in (self.errors, self.held) if own is not None)

    @property
    def is_finite(self) -> bool:
        left = self.cross if self.errors is None else self.errors
        return bool(torch.isfinite(self.squares).all() & torch.isfinite(left).all())

    def __iadd__(self, other: WideEquations) -> Self:
        many = self.factor.shape[1] + other.factor.shape[1] > 2 * self.kept
        if many or self.errors is None or other.errors is None:
            self.held, self.errors = self.cross, None
            self.held += other.cross
        else:
            self.errors = torch.cat([self.errors, other.errors], 1)
        self.factor = torch.cat([self.factor, other.factor], 1)
        self.missing += other.missing
        if many:
            self.factor, more = _reduced(self.factor, self.kept)
            self.missing += more
        self.squares += other.squares
        self.rows += other.rows
        self.error += other.error
        return self

    def answered(self) -> WideEquations:
        """The sums over the same rows, errors of zero."""
        errors, held = (None if own is None else torch.zeros_like(own) for own in (self.errors, self.held))
        return replace(self, errors=errors, held=held, error=0.0)

    def solve(self, damping: float) -> Solved:
        """ΔΘ with relative damping ρ = `damping`, at least 1e-6."""
        used, ridge = max(damping, LEAST), self._ridge(damping)
        kernel, root = self._factorized(damping)
        # explained are 2⟨ΔΘ, C⟩ − ‖ΔΘ Bᵀ‖²
        if self.errors is not None:
            shares = torch.cholesky_solve(self.errors, root)
            change = shares.mT @ self.factor
            explained = float(((kernel @ shares) * (self.errors + ridge * shares)).sum())
        else:
            cross = self.cross
            change = divided(cross, self.factor, root, ridge)
            explained = float((change * (cross + change * ridge)).sum())  # ΔΘ BᵀB is C − λ ΔΘ
        return Solved(
            change=change,
            damping=used,
            explained=explained / self.error if self.error > 0 else 0.0,
            dead=int((self.factor == 0).all(1).sum()),
        )

    def metric(self, damping: float) -> Metric:
        """Of G + λI."""
        ridge, (_, root) = self._ridge(damping), self._factorized(damping)
        return Metric(
            lambda x: x @ self.factor.mT @ self.factor + x * ridge,
            lambda x: divided(x, self.factor, root, ridge),
        )

    def _factorized(self, damping: float) -> tuple[Tensor, Tensor]:
        """BBᵀ, and the Cholesky factor of BBᵀ + λI."""
        kernel = self.factor @ self.factor.mT
        eye = torch.eye(kernel.shape[1], dtype=kernel.dtype, device=kernel.device)
        return kernel, torch.linalg.cholesky(kernel + self._ridge(damping) * eye)

    def _ridge(self, damping: float) -> Tensor:
        """λ of every group."""
        ridge = max(damping, LEAST) * self.squares / self.factor.shape[2] + self.missing
        return torch.where(ridge > 0, ridge, 1.0)[:, None, None]


def divided(value: Tensor, rows: Tensor, root: Tensor, ridge: Tensor | float) -> Tensor:
    """V (RᵀR + λI)⁻¹ from the Cholesky factor of RRᵀ + λI (Woodbury)."""
    found: Tensor = (value - torch.cholesky_solve(rows @ value.mT, root).mT @ rows) / ridge
    return found


def _reduced(factor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`(groups, r, n)` → `(groups, count, n)` with nearly the same Gram matrix, and half of what it lacks at most."""
    squares, vectors = torch.linalg.eigh(factor @ factor.mT)
    kept, cut = squares[:, -count:], squares[:, -count - 1].clamp(min=0)
    gains = ((kept - cut[:, None]).clamp(min=0) / kept.clamp(min=torch.finfo(kept.dtype).tiny)).sqrt()
    return (vectors[..., -count:] * gains[:, None]).mT @ factor, cut / 2
