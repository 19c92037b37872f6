"""The one equation where every sample has an operator of its own.

That is so wherever an operand depends on the sample: the held branch of an attention, a gate, a grid. Nothing can be
factorized once for all; a matrix is decomposed as one of a batch, and an operator known by its products alone is solved
by conjugate gradients. Damping is decided sample by sample, as in `fxinvert.linalg.anchored`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxinvert.linalg.anchored import Correction, SolveSettings
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.recycled import Recycled
from fxinvert.linalg.solvers import cgls
from fxinvert.linalg.vectors import flat, norm, per_sample


class EachFunction(LinearOperator):
    """x ↦ f(x) − f(0) for a function affine in x, another one for every sample; the adjoint comes from autograd.

    Args:
        function: maps `(B, *in_shape)` to `(B, *out_shape)`, row by row, for this one B.
        like: `(B, *in_shape)`, has the dtype and device in which the function works.
        dtype: in which to give and take; by default that of `like`.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], like: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        self.function, self.own = function, like.dtype
        with torch.enable_grad():
            self._leaf = torch.zeros_like(like, requires_grad=True)
            self._output = function(self._leaf)
        super().__init__(like.shape[1:], self._output.shape[1:], like)
        self.dtype = dtype or like.dtype
        self.offset = self._output.detach().to(self.dtype)

    def apply(self, x: Tensor) -> Tensor:
        return self.function(x.to(self.own)).to(self.dtype) - self.offset

    def adjoint(self, r: Tensor) -> Tensor:
        (pulled,) = torch.autograd.grad(self._output, self._leaf, r.to(self.own), retain_graph=True)
        return pulled.to(self.dtype)

    def to(self, dtype: torch.dtype) -> EachFunction:
        return EachFunction(self.function, self._leaf.detach(), dtype)


#: how far below σ_max the estimate that conjugate gradients leave may lie
DOUBT = 4.0


def solve_each(operator: EachFunction, r: Tensor, settings: SolveSettings) -> Correction:
    """A⁺_λ r for every sample's own A, by conjugate gradients.

    Args:
        operator: A.
        r: `(B, *out_shape)`, target − output.
        settings: κ and the limit of iterations.
    """
    # half precisions are evaluated as they are: their products have no more digits
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(operator.own, torch.finfo(operator.own).eps)
    size = torch.linalg.vector_norm(flat(r), dim=1)

    none = torch.zeros_like(size)
    options: dict[str, Any] = {
        "tolerance": tolerance,
        "small_enough": tolerance * size,
        "limit": torch.full_like(size, settings.max_iterations, dtype=torch.long),
    }
    # orthogonalized completely: what has no more to give is noticed, however ill-conditioned
    found = Recycled(none).solve(operator, r, largest=none, slope=none, skip=none > 0, **options)
    value, limit = found.correction, settings.limit(r.dtype)
    moved = torch.linalg.vector_norm(flat(value), dim=1)
    largest = found.largest
    if bool((DOUBT * largest * moved > limit * size).any()):
        largest = torch.maximum(largest, _largest_singular_values(operator))
    damped = (largest * moved > limit * size) | ~found.converged
    damping = torch.where(damped, (largest / limit).square(), 0)
    iterations, missed = found.iterations, None
    if bool(damped.any()):
        again = cgls(operator, r, damping, largest=largest, skip=~damped, **options)
        value = torch.where(per_sample(damped, value), again.correction, value)
        iterations = torch.maximum(iterations, again.iterations)
        if not bool(again.converged.all()):
            rho = r - operator.apply(value)
            slope = norm(operator.adjoint(rho) - per_sample(damping, value) * value)
            error = torch.minimum(slope / (largest * norm(rho)), norm(rho) / size)
            missed = torch.where(again.converged, 0, error)
            value = torch.where(per_sample(again.converged, value), value, 0)
            damped = damped & again.converged
    return Correction(
        value,
        damped,
        float(damping.max()) if len(r) else 0.0,
        int(iterations.max()) if len(r) else 0,
        None,
        missed,
    )


def _largest_singular_values(operator: EachFunction, iterations: int = 20) -> Tensor:
    """`(B,)`, σ_max of every sample's operator by power iteration; a lower bound, within a few per cent."""
    start = torch.randn(operator.in_shape, generator=torch.Generator().manual_seed(0))
    x = start.to(operator.offset).expand(len(operator.offset), *operator.in_shape)
    size = torch.linalg.vector_norm(flat(x), dim=1)
    for _ in range(iterations):
        unit = x / per_sample(torch.where(size > 0, size, 1), x)
        x = operator.adjoint(operator.apply(unit))
        size = torch.linalg.vector_norm(flat(x), dim=1)
    largest: Tensor = size.sqrt()
    return largest


#: numbers of matrices and right-hand sides that are worked on at once, in double precision and several copies
AT_ONCE = 2**23


def solve_batched(matrices: Tensor, r: Tensor, limit: float) -> Correction:
    """A⁺_λ r for every row r of a batch, damped row by row as `solve_anchored` does.

    No more of them are decomposed at once than `AT_ONCE`, or one.

    Args:
        matrices: A, `(…, m, n)`, one for each group of rows; a matrix that is not finite gives NaN.
        r: `(…, rows, m)`.
        limit: κ.
    """
    lead = [1] * (r.dim() - matrices.dim()) + list(matrices.shape[:-2])
    axis = next((axis for axis, count in enumerate(lead) if count > 1), None)
    size = matrices.numel() + r.numel()
    if axis is None or size <= AT_ONCE:
        return _decomposed_and_solved(matrices, r, limit)
    step = max(1, lead[axis] * AT_ONCE // size)
    split = (torch.split(v, step, axis) for v in (matrices.reshape(*lead, *matrices.shape[-2:]), r))
    parts = [solve_batched(own, its, limit) for own, its in zip(*split, strict=True)]
    return Correction(
        torch.cat([part.value for part in parts], axis),
        torch.cat([part.damped for part in parts], axis),
        max(part.damping for part in parts),
        0,
        max((part.condition for part in parts if part.condition is not None), default=None),
    )


def _decomposed_and_solved(matrices: Tensor, r: Tensor, limit: float) -> Correction:
    finite = torch.isfinite(matrices).all(-1).all(-1)[..., None, None]
    u, values, vt = decomposed(torch.where(finite, matrices, 0).double(), exactly=r.dtype == torch.float64)
    largest = values[..., :1]
    kept = values > max(matrices.shape[-2:]) * torch.finfo(values.dtype).eps * largest
    gains = torch.where(kept, 1 / torch.where(kept, values, 1), 0)[..., None, :]
    values, largest = values[..., None, :], largest[..., None, :]
    coefficients = r.double() @ u
    free = coefficients * gains
    size = torch.linalg.vector_norm(r.double(), dim=-1, keepdim=True)
    amplified = largest * torch.linalg.vector_norm(free, dim=-1, keepdim=True) > limit * size
    damping = torch.where(amplified, (largest / limit).square(), 0)
    damped = coefficients * values / torch.where(amplified, values.square() + damping, 1)
    correction = torch.where(finite, torch.where(amplified, damped, free) @ vt, torch.nan)
    condition = largest * gains.amax(-1, keepdim=True)
    return Correction(
        correction.to(r.dtype),
        amplified,
        float(damping.max()) if damping.numel() else 0.0,
        0,
        (float(condition.max()) or None) if condition.numel() else None,
    )


def decomposed(matrices: Tensor, *, exactly: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values, the largest first, and Vᵀ, of every matrix `(…, m, n)` of a batch, in float64.

    Exactly by singular value decomposition. Else, in a third to half of the time, by the eigenvectors of the smaller
    Gram matrix, which tell values down to 1e-8 of the largest: enough for what has single precision. The others are 0.
    """
    if exactly or not matrices.numel():
        u, values, vt = torch.linalg.svd(matrices, full_matrices=False)
        return u, values, vt
    tall = matrices.shape[-2] > matrices.shape[-1]
    a = matrices.mT if tall else matrices
    squares, vectors = torch.linalg.eigh(a @ a.mT)
    squares, left = squares.flip(-1), vectors.flip(-1)
    told = squares > max(a.shape[-2:]) * torch.finfo(a.dtype).eps * squares[..., :1]
    values = torch.where(told, squares, 0).sqrt()
    right = torch.where(told, 1 / torch.where(told, values, 1), 0)[..., None] * (left.mT @ a)
    return (right.mT, values, left.mT) if tall else (left, values, right)
