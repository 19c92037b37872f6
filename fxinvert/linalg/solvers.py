"""Solvers for the anchored, damped problem: factor once, solve many.

With r = t − f(x0) every solver computes the correction

    A⁺_λ r = Aᵀ(AAᵀ + λI)⁻¹ r = (AᵀA + λI)⁻¹Aᵀ r,

the minimizer of ‖A d − r‖² + λ‖d‖² (Tikhonov), for λ = 0 the least-squares solution of least norm (Moore–Penrose).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.operators import Diagonal, LinearOperator


class Solution(NamedTuple):
    """A correction `(B, *in_shape)`, the iterations it took, and which samples converged `(B,)` (None: all)."""

    correction: Tensor
    iterations: int = 0
    converged: Tensor | None = None


class Factor(ABC):
    """An operator made ready for many right-hand sides.

    Attributes:
        largest: the largest singular value σ_max.
        condition: σ_max over the smallest singular value that is kept; None where it is not known.
    """

    largest: float
    condition: float | None = None

    @abstractmethod
    def solve(self, r: Tensor, damping: float) -> Solution:
        """A⁺_λ r for `r` of shape `(B, *out_shape)` and λ = `damping`."""


class DiagonalFactor(Factor):
    """s / (s² + λ), entry by entry; zeros of s get no correction."""

    def __init__(self, operator: Diagonal) -> None:
        self.scale = operator.scale
        size = self.scale.abs()
        kept = size[size > 0]
        self.largest = float(size.max()) if size.numel() else 0.0
        self.condition = self.largest / float(kept.min()) if kept.numel() else None

    def solve(self, r: Tensor, damping: float) -> Solution:
        if damping:
            return Solution(r * (self.scale / (self.scale.square() + damping)))
        zero = self.scale == 0
        # a true division: its rounding returns the anchor's own neighbour, a reciprocal's does not
        return Solution(torch.where(zero, 0, r / torch.where(zero, 1, self.scale)))


class SpectralFactor(Factor):
    """Pseudo-inverse from the eigenvalues of the smaller Gram matrix, in float64.

    Singular values below `max(m, n) · ε · σ_max` of the Gram matrix's accuracy count as zero; one Newton–Schulz step
    P ← P (2I − A P) restores the digits that squaring the condition number costs (Ben-Israel & Cohen 1966).
    """

    def __init__(self, operator: LinearOperator) -> None:
        self.in_shape, self.dtype = operator.in_shape, operator.dtype
        self._matrix = a = operator.double().dense()
        m, n = operator.size
        gram = a @ a.T if m <= n else a.T @ a
        values, self._vectors = torch.linalg.eigh(gram)
        top = float(values[-1].clamp(min=0)) if values.numel() else 0.0
        self._values = torch.where(values > max(m, n) * torch.finfo(a.dtype).eps * top, values, 0.0)
        kept = self._values[self._values > 0]
        self.largest = top**0.5
        self.condition = (top / float(kept[0])) ** 0.5 if kept.numel() else None
        self._inverses: dict[float, Tensor] = {}

    def solve(self, r: Tensor, damping: float) -> Solution:
        if damping not in self._inverses:
            self._inverses[damping] = self._inverse(damping)
        return Solution((r.flatten(1) @ self._inverses[damping].T).reshape(len(r), *self.in_shape))

    def _inverse(self, damping: float) -> Tensor:
        gains = torch.where(self._values > 0, 1 / (self._values + damping), 0.0)
        core = (self._vectors * gains) @ self._vectors.T
        a = self._matrix
        inverse = a.T @ core if len(core) == len(a) else core @ a.T
        if not damping:
            inverse = 2 * inverse - inverse @ (a @ inverse)
        return inverse.to(self.dtype)


class IterativeFactor(Factor):
    """Batched conjugate gradients on the normal equations (CGLS, Björck 1996, §7.4), every sample on its own.

    Started at zero it converges to the least-norm solution; each sample stops by itself when its residual or its
    normal residual is small, so that a row never depends on its neighbours.
    """

    def __init__(self, operator: LinearOperator, iterations: int) -> None:
        self.operator, self.limit = operator, iterations
        self.largest = _largest_singular_value(operator)

    def solve(self, r: Tensor, damping: float) -> Solution:
        operator = self.operator
        tolerance = 1e-12 if r.dtype == torch.float64 else 1e-6
        x = torch.zeros(len(r), *operator.in_shape, dtype=r.dtype, device=r.device)
        residual, s = r.clone(), operator.adjoint(r)
        p, gamma, start = s, _dot(s, s), _dot(r, r)
        converged = (gamma == 0) | (start == 0)
        step = 0
        for step in range(1, self.limit + 1):  # noqa: B007 (the last value is reported)
            q = operator.apply(p)
            curvature = _dot(q, q) + damping * _dot(p, p)
            alpha = torch.where(converged, 0, gamma / torch.where(converged, 1, curvature))
            x = x + _rows(alpha, x) * p
            residual = residual - _rows(alpha, residual) * q
            s = operator.adjoint(residual) - damping * x
            renewed = _dot(s, s)
            size = _dot(residual, residual)
            converged = converged | (size <= tolerance**2 * start)
            converged = converged | (renewed <= (tolerance * self.largest) ** 2 * size)
            if bool(converged.all()):
                break
            beta = torch.where(converged, 0, renewed / torch.where(converged, 1, gamma))
            p, gamma = s + _rows(beta, p) * p, renewed
        return Solution(x, step, converged)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _rows(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.reshape(-1, *[1] * (like.dim() - 1))


def _largest_singular_value(operator: LinearOperator, iterations: int = 20) -> float:
    """σ_max by power iteration from a fixed start; a lower bound, within a few per cent."""
    start = torch.randn(1, *operator.in_shape, generator=torch.Generator().manual_seed(0))
    x = start.to(device=operator.device, dtype=operator.dtype)
    size = x.norm()
    for _ in range(iterations):
        x = operator.adjoint(operator.apply(x / size))
        size = x.norm()
        if not float(size):
            return 0.0
    return float(size) ** 0.5
