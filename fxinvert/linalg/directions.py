"""The best combination of some directions, of which it is known how each changes a residual; samples by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from fxinvert.linalg.vectors import flat

#: what is added to the diagonal of the small systems, whose diagonal is 1, in units of the rounding error: directions
#: may be nearly dependent
RIDGE = 10


class Directions:
    """The last directions ΔX and the changes ΔR of the residual, in a ring: `(B, k, n)`, with the Gram matrix of ΔR.

    Args:
        x: `(B, …)`, what the directions look like.
        residual: `(B, …)`, what the changes look like.
        most: k.
        entries: of ΔX and ΔR per sample, which may lessen k to 2.
    """

    def __init__(self, x: Tensor, residual: Tensor, most: int, entries: int) -> None:
        rows, n, m = len(x), flat(x).shape[1], flat(residual).shape[1]
        self._size = max(2, min(most, entries // max(1, n + m)))
        self._shape = x.shape[1:]
        self._moved, self._changed = x.new_zeros(rows, self._size, n), x.new_zeros(rows, self._size, m)
        self._gram = x.new_zeros(rows, self._size, self._size, dtype=torch.float64)
        self._count = 0

    def add(self, moved: Tensor, changed: Tensor) -> None:
        """One more direction, in the place of the oldest."""
        self._count += 1
        self.replace(moved, changed)

    def replace(self, moved: Tensor, changed: Tensor) -> None:
        """Another one in the place of the newest."""
        at = (self._count - 1) % self._size
        self._moved[:, at], self._changed[:, at] = flat(moved), flat(changed)
        line = self._along(changed)
        self._gram[:, at, : self._known] = self._gram[:, : self._known, at] = line

    def combined(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """ΔX γ and r − ΔR γ, the least of these."""
        gram = self._gram[:, : self._known, : self._known]
        weights = _least_squares(gram, self._along(residual), torch.finfo(residual.dtype).eps)
        weights = weights.to(residual.dtype)[:, None]
        moved, changed = weights @ self._moved[:, : self._known], weights @ self._changed[:, : self._known]
        return moved.reshape(-1, *self._shape), residual - changed.reshape(residual.shape)

    @property
    def _known(self) -> int:
        return min(self._count, self._size)

    def _along(self, change: Tensor) -> Tensor:
        """ΔRᵀ v, `(B, k)`: a row times a matrix is several times faster than a matrix times a column."""
        return (flat(change)[:, None] @ self._changed[:, : self._known].mT)[:, 0].double()


def _least_squares(gram: Tensor, known: Tensor, eps: float) -> Tensor:
    """G⁻¹ b, `(B, k)`; directions of very different lengths are compared by what they are along."""
    scale = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, 1)
    gram = torch.nan_to_num(gram / scale[:, :, None] / scale[:, None, :], 0, 0, 0)
    known = torch.nan_to_num(known / scale, 0, 0, 0)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights: Tensor = torch.linalg.solve(gram + RIDGE * eps * identity, known) / scale
    return weights
