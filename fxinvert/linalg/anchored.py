"""The one equation, for one operator and a batch of right-hand sides.

Damping is decided per sample, from the effective condition number of Chan & Foulser (SIAM J. Sci. Stat. Comput. 9,
1988), σ_max‖d‖ / ‖r‖: a target that the undamped solution reaches without being blown up keeps it (λ = 0), even if
the matrix is ill-conditioned; a sample whose correction is amplified beyond κ is solved again with λ = (σ_max/κ)². So is one
that an iteration does not converge for, with the κ for which it does in theory (`Factor.manageable`), if that is less; if it
does not then either, the sample is not moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.memory import LEDGER, SHARE, Ledger, free_memory, full_precision, ledger
from fxinvert.linalg.solvers import Factor
from fxinvert.linalg.vectors import flat, per_sample

Method = Literal["diagonal", "spectral", "qr", "cholesky", "banded", "capacitance", "circulant", "iterative"]


@dataclass(frozen=True)
class SolveSettings:
    """How linear systems are solved.

    Attributes:
        condition_limit: κ, the largest effective condition number that is left undamped; by default 1e3, and its
            square in float64, which has twice the digits.
        direct_limit: largest smaller side of a matrix that is decomposed into singular values.
        max_iterations: limit for iterative solvers; reaching it is reported as damping.
        memory_limit: bytes that a factorization, or the work on a batch, may take; by default a quarter of what is free.
            Factorizations that are kept take no more than that all together.
        memory_share, work_share: the parts of these that factorizations, and the work on a batch, may take, where the limit is
            one for other things, too.
        method: the solver; by default the one that costs least.
        methods: the solvers of single ops, by the path of their nodes.
        expected: right-hand sides that are expected for one factorization.
        sharing: ops whose factorizations share the memory of those that are kept.
        compiled: whether elementwise rules and norms are compiled.
    """

    condition_limit: float | None = None
    direct_limit: int = 2048
    max_iterations: int = 300
    memory_limit: int | None = None
    memory_share: float = 1.0
    work_share: float = 1.0
    method: Method | None = None
    methods: Mapping[str, Method] = field(default_factory=dict)
    expected: int = 20_000
    sharing: int = 1
    compiled: bool = False

    def at(self, path: str) -> SolveSettings:
        """The settings of the op at a node."""
        return replace(self, method=self.methods.get(path, self.method), methods={})

    def memory(self, device: torch.device) -> int:
        """Bytes that a factorization may take."""
        return int(self.memory_share * self._limit(device))

    def work(self, device: torch.device) -> int:
        """Bytes that the work on a batch may take."""
        return int(self.work_share * self._limit(device))

    @property
    def ledger(self) -> Ledger:
        """Of the factorizations that are kept: all with the same limit keep to it together."""
        return LEDGER if self.memory_limit is None else ledger(int(self.memory_share * self.memory_limit))

    def _limit(self, device: torch.device) -> float:
        return self.memory_limit if self.memory_limit is not None else SHARE * free_memory(device)

    def limit(self, dtype: torch.dtype) -> float:
        """κ for values of a dtype."""
        if self.condition_limit is not None:
            return self.condition_limit
        return 1e6 if dtype == torch.float64 else 1e3


@dataclass(frozen=True)
class Correction:
    """Solution of the anchored problem for a batch.

    Attributes:
        value: `(B, *in_shape)`, A⁺_λ r; 0 for samples that have not converged.
        damped: `(B,)`, samples that were damped.
        damping: the largest λ used, 0 where nothing was damped.
        iterations: of the iterative solver, 0 for direct ones.
        condition: of the operator, where known.
        missed: `(B,)`, by how much samples have not converged (`Factor.error`), 0 for those that have; None where all have.
    """

    value: Tensor
    damped: Tensor
    damping: float
    iterations: int
    condition: float | None
    missed: Tensor | None = None


def solve_anchored(factor: Factor, r: Tensor, settings: SolveSettings) -> Correction:
    """Correction d = A⁺_λ r per sample, λ = 0 unless the sample is ill-conditioned.

    A batch whose work does not fit into the memory limit is solved in parts.

    Args:
        factor: of A, from `factorize`.
        r: `(B, *out_shape)`, target − output.
        settings: κ and the limits.

    Raises:
        SolveError: r has another shape than the operator's outputs, or is on another device.
    """
    a = factor.operator
    if r.shape[1:] != a.out_shape or r.device != a.device:
        raise SolveError(
            f"right-hand sides (B, {', '.join(map(str, r.shape[1:]))}) on {r.device} were given to a solver for "
            f"(B, {', '.join(map(str, a.out_shape))}) on {a.device}; both must be the same"
        )
    with full_precision(r.device):
        return _solved(factor, r, settings)


def _solved(factor: Factor, r: Tensor, settings: SolveSettings) -> Correction:
    rows = max(1, settings.work(r.device) // factor.work) if len(r) else 1
    if len(r) > rows:
        parts = [_solved(factor, part, settings) for part in torch.split(r, rows)]
        return Correction(
            torch.cat([part.value for part in parts]),
            torch.cat([part.damped for part in parts]),
            max(part.damping for part in parts),
            max(part.iterations for part in parts),
            factor.condition,
            _joined(parts),
        )
    limit = settings.limit(r.dtype)
    solution = factor.solve(r, 0.0, limit)
    value, iterations = solution.correction, solution.iterations
    if solution.converged is None and factor.condition is not None and 2 * factor.condition <= limit:
        # no correction is amplified by more than the condition, which may be known to a few per cent only
        none = torch.zeros(len(r), dtype=torch.bool, device=r.device)
        return Correction(value, none, 0.0, iterations, factor.condition)
    left = (
        torch.zeros(len(r), dtype=torch.bool, device=r.device)
        if solution.converged is None
        else ~solution.converged
    )
    damped = _amplified(factor.largest, value, r, settings) | left
    if not bool(damped.any()):
        return Correction(value, damped, 0.0, iterations, factor.condition)
    value, damping = value.clone(), 0.0

    def again(rows: Tensor, kappa: float) -> Tensor:
        """Solves some rows with λ = (σ_max/κ)²; which of them have not converged either."""
        nonlocal damping, iterations
        failed = torch.zeros_like(rows)
        if bool(rows.any()):
            own = (factor.largest / kappa) ** 2
            solution = factor.solve(r[rows], own)
            value[rows] = solution.correction
            damping, iterations = max(damping, own), max(iterations, solution.iterations)
            if solution.converged is not None:
                failed[rows] = ~solution.converged
        return failed

    left = left | again(damped & ~left, limit) if factor.manageable < limit else damped
    left = again(left, min(limit, factor.manageable))
    if not bool(left.any()):
        return Correction(value, damped, damping, iterations, factor.condition)
    missed = torch.zeros(len(r), dtype=r.dtype, device=r.device)
    missed[left] = factor.error(r[left], value[left], damping).to(r.dtype)
    value[left] = 0
    return Correction(value, damped & ~left, damping, iterations, factor.condition, missed)


def _joined(parts: Sequence[Correction]) -> Tensor | None:
    """What the parts of a batch missed."""
    if all(part.missed is None for part in parts):
        return None
    none = [torch.zeros(len(part.value), dtype=part.value.dtype, device=part.value.device) for part in parts]
    return torch.cat([n if p.missed is None else p.missed for n, p in zip(none, parts, strict=True)])


def solve_diagonal(
    scale: Tensor, r: Tensor, settings: SolveSettings, *, overwrite: bool = False
) -> Correction:
    """The same for y = s ⊙ x, entry by entry: s / (s² + λ); zeros of s get no correction.

    Args:
        scale: s, of any shape that broadcasts to `r`: one for all samples, or one for each.
        r: `(B, …)`, target − output.
        settings: κ.
        overwrite: whether the correction may take the place of r.
    """
    scale, limit = scale.reshape((1,) * (r.dim() - scale.dim()) + scale.shape), settings.limit(r.dtype)
    size, zero = scale.abs(), scale == 0
    pruned = bool(zero.any())
    smallest = flat(torch.where(zero, torch.inf, size) if pruned else size).amin(1)
    largest = flat(size).amax(1)
    condition = _largest(largest / smallest) or None
    # nothing is blown up more than by the condition
    tame = condition is not None and condition <= limit
    # a true division: its rounding returns the anchor's own neighbour, a reciprocal's does not
    value = torch.div(r, torch.where(zero, 1, scale), out=r if overwrite and tame else None)
    if pruned:
        value = torch.where(zero, 0, value)
    if tame:
        return Correction(value, zero.new_zeros(len(r)), 0.0, 0, condition)
    amplified = _amplified(largest, value, r, settings)
    damping = torch.where(amplified, (largest / limit) ** 2, 0)
    if bool(amplified.any()):
        per_row = per_sample(damping, r)
        value = torch.where(per_row > 0, r * (scale / (scale.square() + per_row)), value)
    return Correction(value, amplified, _largest(damping), 0, condition)


def _amplified(largest: Tensor | float, value: Tensor, r: Tensor, settings: SolveSettings) -> Tensor:
    """`(B,)`: the samples whose correction is blown up beyond κ."""
    moved, size = (torch.linalg.vector_norm(flat(v), dim=1) for v in (value, r))
    amplified: Tensor = largest * moved > settings.limit(r.dtype) * size
    return amplified


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
