"""A Gram matrix factorized for one damping, in the dtype, and with the shift, that its condition asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.definite import NotDefiniteError, definite_inverse, without_dead
from fxinvert.linalg.equilibrated import Equilibrated
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.solvers import SINGLE
from fxinvert.linalg.vectors import flat, norm, per_sample

#: condition from which the Gram matrix is shifted
SHIFTED = 1e7
#: the first shift, relative to σ_max², where K is AAᵀ, so that the shift is divided by, and else; and the last
FIRST_SHIFT, LAST_SHIFT = {True: 1e-7, False: 1e-9}, 1e-3
#: relative error of a factorization's own answers beyond which it is useless, even to refine them
USEFUL = 1e-3
#: what an iteration must add to an estimate of an eigenvalue, to be followed by another
SETTLED = 1.003


class Inverse(Protocol):
    """(K + μI)⁻¹, ready to be applied."""

    dtype: torch.dtype

    @property
    def nbytes(self) -> int: ...

    def solve(self, value: Tensor) -> Tensor:
        """`(B, *shape)` → the same, in `dtype`."""

    def to(self, dtype: torch.dtype) -> None:
        """Solves in another dtype from now on."""


#: makes (K + μI)⁻¹ from A and μ, for K = AAᵀ where A has no more outputs than inputs, else AᵀA
Factorization = Callable[[LinearOperator, float], Inverse]


class DenseInverse:
    """(K + μI)⁻¹ as a matrix.

    Args:
        operator: A.
        shift: μ.

    Raises:
        NotDefiniteError: K + μI is not positive definite to working precision.
    """

    def __init__(self, operator: LinearOperator, shift: float) -> None:
        a = operator.to(torch.float64).dense()
        dual = a.shape[0] <= a.shape[1]
        self.shape, self.dtype = operator.out_shape if dual else operator.in_shape, torch.float64
        shifted = without_dead(a @ a.T if dual else a.T @ a)
        shifted.diagonal().add_(shift)
        self._inverse = definite_inverse(shifted)

    @property
    def nbytes(self) -> int:
        return self._inverse.nbytes

    def solve(self, value: Tensor) -> Tensor:
        return (flat(value).to(self.dtype) @ self._inverse).reshape(len(value), *self.shape)

    def to(self, dtype: torch.dtype) -> None:
        self._inverse, self.dtype = self._inverse.to(dtype), dtype


class Level(Protocol):
    """How answers are made and mended.

    Attributes:
        shift: μ, 0 where there is no need for one.
        condition: of A, σ_max over the smallest singular value that is known.
        error: what rounding may do to an answer, relative to it; infinite where there is a shift.
        inverse: what is factorized.
    """

    shift: float
    condition: float
    error: float
    inverse: Inverse

    def solve(self, value: Tensor) -> Tensor:
        """(K + (λ + μ)I)⁻¹ of vectors of the smaller side."""

    def answer(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """x, and the y with x = Aᵀy where mending it takes that."""

    def change(self, rho: Tensor, slope: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What to add to x, and to y, in float64, for ρ = r − A x and Aᵀρ − λx."""


class Plain:
    """A level for K + λI as it is.

    Args:
        factorized: makes it.
        operators: A in the dtypes of right-hand sides and in float64.
        dtype: of the right-hand sides.
        largest: σ_max.
        damping: λ.
        shifts: whether a shift may help.

    Raises:
        SolveError: no shift makes the Gram matrix definite.
        NotDefiniteError: it is not, and must not be shifted.
    """

    def __init__(
        self,
        factorized: Factorization,
        operators: Mapping[torch.dtype, LinearOperator],
        dtype: torch.dtype,
        largest: float,
        damping: float,
        *,
        shifts: bool = True,
    ) -> None:
        self._operators, self._damping, square = operators, damping, largest**2
        exact = operators[torch.float64]
        self.dual, self.shift = exact.size[0] <= exact.size[1], 0.0
        start, other = probes(exact, self.dual), probes(exact, not self.dual)
        # what A can give, and anything at all, of which the parts that it nearly annuls lose most
        right = torch.cat([exact.apply(other) if self.dual else exact.adjoint(other), start])
        while True:
            try:
                self.inverse = factorized(exact, damping + self.shift)
            except NotDefiniteError:
                smallest, left, worst = 0.0, math.inf, math.inf
            else:
                smallest = smallest_of(self.inverse.solve, start)
                found = self.inverse.solve(right)
                product = (
                    exact.apply(exact.adjoint(found)) if self.dual else exact.adjoint(exact.apply(found))
                )
                missed = norm(product + (damping + self.shift) * found - right) / norm(right)
                left, worst = float(missed[: len(other)].max()), float(missed.max())
            if smallest > 0 and left <= USEFUL and (self.shift or smallest * SHIFTED**2 > square):
                break
            if not shifts:
                raise NotDefiniteError
            self.shift = max(FIRST_SHIFT[self.dual] * square, 100 * self.shift)
            if self.shift > LAST_SHIFT * square:
                raise SolveError(
                    "the Gram matrix is not positive definite, however it is shifted; its entries overflow"
                )
        system = math.sqrt((square + damping + self.shift) / smallest)
        self.condition = largest / math.sqrt(
            max(smallest - damping - self.shift, 0) or self.shift or smallest
        )
        lost = max(system**2, worst / torch.finfo(torch.float64).eps)
        if dtype == torch.float32 and lost <= SINGLE**2:
            self.inverse.to(torch.float32)
        self.error = math.inf if self.shift else lost * torch.finfo(self.inverse.dtype).eps

    def solve(self, value: Tensor) -> Tensor:
        return self.inverse.solve(value)

    def answer(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        a = self._operators[self.inverse.dtype]
        right = r.to(a.dtype)
        if self.dual:
            y = self.inverse.solve(right)
            return a.adjoint(y), y if self._damping else None
        return self.inverse.solve(a.adjoint(right)), None

    def change(self, rho: Tensor, slope: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.dual:
            return self.inverse.solve(slope).double(), None
        more = self.inverse.solve(rho if y is None else rho - self._damping * y).double()
        return self._operators[torch.float64].adjoint(more), None if y is None else more


class Even:
    """An undamped level for an operator of full rank, by its equilibration.

    Args:
        factorized: makes K'⁻¹.
        equilibrated: A' and H.
        largest: σ_max of A.

    Raises:
        NotDefiniteError: the operator has not full rank.
    """

    shift = 0.0

    def __init__(self, factorized: Factorization, equilibrated: Equilibrated, largest: float) -> None:
        self._from, self._a = equilibrated, equilibrated.operator
        operators = {torch.float64: self._a}
        self._level = Plain(factorized, operators, torch.float64, self._a.norm(), 0.0, shifts=False)
        self.inverse = self._level.inverse
        smallest = smallest_of(self.solve, probes(self._a, self._level.dual))
        if not smallest:
            raise NotDefiniteError
        self.condition = largest / math.sqrt(smallest)
        # in the worst case all that is wrong is in the direction that H, or its inverse, enlarges most
        self.error = self._level.error * equilibrated.condition

    def solve(self, value: Tensor) -> Tensor:
        return self._from.solve_transposed(self.inverse.solve(self._from.solve(value)))

    def answer(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._level.dual:
            return self._level.answer(self._from.solve(r.double()))
        x, y = self._level.answer(r.double())
        return self._from.solve_transposed(x), y

    def change(self, rho: Tensor, slope: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.answer(rho)


def probes(operator: LinearOperator, outputs: bool) -> Tensor:
    """Four random vectors of either side, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    shape = operator.out_shape if outputs else operator.in_shape
    return torch.randn(4, *shape, generator=generator, dtype=torch.float64).to(operator.device)


def smallest_of(solve: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 8) -> float:
    """The smallest eigenvalue of a matrix by inverse iteration; an upper bound, a little above.

    The lengths that are looked at only grow, and it is done when one more iteration adds next to nothing.
    """
    value, largest = start, 0.0
    for _ in range(iterations):
        size = norm(value)
        if not bool(torch.isfinite(size).all()):
            return 0.0
        value, before = solve(value / per_sample(size, value)), largest
        largest = float(norm(value).max())
        if largest <= SETTLED * before:
            break
    return 1 / largest if largest > 0 and math.isfinite(largest) else 0.0
