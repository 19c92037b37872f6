"""The one equation, for one operator and a batch of right-hand sides.

Damping is decided per sample, from the effective condition number of Chan & Foulser (SIAM J. Sci. Stat. Comput. 9,
1988), σ_max‖d‖ / ‖r‖: a target that the undamped solution reaches without being blown up keeps it (λ = 0), even if
the matrix is ill-conditioned; a sample whose correction is amplified beyond κ is solved again with λ = (σ_max/κ)².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg.operators import Diagonal, LinearOperator
from fxinvert.linalg.solvers import DiagonalFactor, Factor, IterativeFactor, SpectralFactor


@dataclass(frozen=True)
class SolveSettings:
    """How linear systems are solved.

    Attributes:
        condition_limit: κ, the largest effective condition number that is left undamped.
        direct_limit: largest smaller side for which a direct factorization is made.
        direct_memory: largest matrix, in entries, that is ever formed.
        max_iterations: limit for iterative solvers; reaching it is reported as damping.
    """

    condition_limit: float = 1e3
    direct_limit: int = 1024
    direct_memory: int = 2**24
    max_iterations: int = 300


@dataclass(frozen=True)
class Correction:
    """Solution of the anchored problem for a batch.

    Attributes:
        value: `(B, *in_shape)`, A⁺_λ r.
        left: `(B, *out_shape)`, r − A A⁺_λ r, what the correction does not reach.
        damped: `(B,)`, samples that were damped or stopped early.
        damping: the λ of the damped samples, 0 where none is.
        iterations: of the iterative solver, 0 for direct ones.
        condition: of the operator, where known.
    """

    value: Tensor
    left: Tensor
    damped: Tensor
    damping: float
    iterations: int
    condition: float | None


def factorize(operator: LinearOperator, settings: SolveSettings) -> Factor:
    """The factorization that suits the operator: diagonal, spectral where it is small enough, else iterative."""
    if isinstance(operator, Diagonal):
        return DiagonalFactor(operator)
    m, n = operator.size
    if min(m, n) <= settings.direct_limit and m * n <= settings.direct_memory:
        return SpectralFactor(operator)
    return IterativeFactor(operator, settings.max_iterations)


def solve_anchored(
    operator: LinearOperator, factor: Factor, r: Tensor, settings: SolveSettings
) -> Correction:
    """Correction d = A⁺_λ r per sample, λ = 0 unless the sample is ill-conditioned.

    Args:
        operator: the linear part A.
        factor: from `factorize`, of the same operator.
        r: `(B, *out_shape)`, target − output.
        settings: κ and the limits.
    """
    solution = factor.solve(r, 0.0)
    value, iterations = solution.correction, solution.iterations
    size = torch.linalg.vector_norm(r.flatten(1), dim=1)
    moved = torch.linalg.vector_norm(value.flatten(1), dim=1)
    amplified = factor.largest * moved > settings.condition_limit * size
    damped = amplified if solution.converged is None else amplified | ~solution.converged
    damping = 0.0
    if bool(amplified.any()):
        damping = (factor.largest / settings.condition_limit) ** 2
        again = factor.solve(r[amplified], damping)
        value = value.clone()
        value[amplified] = again.correction
        iterations = max(iterations, again.iterations)
    return Correction(value, r - operator.apply(value), damped, damping, iterations, factor.condition)
