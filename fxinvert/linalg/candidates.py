"""The solvers that an operator may get, with their costs.

Costs are counted in operations of a float32 matrix product; what runs slower counts for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fxinvert.linalg.anchored import Method, SolveSettings
from fxinvert.linalg.banded import BlockBanded, Gram, layout
from fxinvert.linalg.capacitance import BLOCK, Capacitance
from fxinvert.linalg.circulant import Circulant, torus
from fxinvert.linalg.convolution import Convolution
from fxinvert.linalg.embedding import embedding
from fxinvert.linalg.gram import GramFactor
from fxinvert.linalg.iterative import IterativeFactor
from fxinvert.linalg.level import DenseInverse, Inverse
from fxinvert.linalg.memory import human
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.qr import QRFactor
from fxinvert.linalg.raised import MOST
from fxinvert.linalg.solvers import WORK, DiagonalFactor, Factor, SpectralFactor

#: how much slower than a float32 matrix product: one in float64; a decomposition into singular values; a product with
#: an operator that is not a matrix; a pass over a vector, by entry
DOUBLE, DECOMPOSITION, PRODUCT, ENTRY = 2.0, 40.0, 2.0, 40.0
#: the same for an orthogonal factorization, and for solving with a triangle
ORTHOGONAL, TRIANGULAR = 24.0, 2.0
#: operations of a factorization that nobody waits for; and what is counted for squaring the condition
PATIENCE, SQUARED = 5e9, 1.5
#: right-hand sides that a factorization serves that has to go before the next
BATCH = 64
#: iterations that conjugate gradients are reckoned with, and with a preconditioner; and the ridge of that
ITERATIONS, PRECONDITIONED, SHIFT, FLOOR = 60, 30, 0.1, 1e-6
#: vectors of either side that an iteration passes over, and of the smaller side for two Fourier transforms
VECTORS, TRANSFORMS = 6, 16


@dataclass(frozen=True)
class Candidate:
    """A solver as the cost model sees it.

    Attributes:
        method: its name.
        factor: operations of the factorization.
        solve: operations for one right-hand side.
        memory: bytes.
        lost: for what part of the batches it has to be made again, because those of the other ops do not fit beside it.
        make: makes it.
        why_not: why it cannot be taken, empty where it can.
    """

    method: Method
    factor: float
    solve: float
    memory: int
    lost: float
    make: Callable[[], Factor]
    why_not: str = ""

    def total(self, expected: int) -> float:
        """Operations for a number of right-hand sides, a factorization that nobody waits for not counted but where it is lost."""
        return max(self.factor - PATIENCE, 0) + expected * (self.solve + self.lost * self.factor / BATCH)


def candidates(operator: LinearOperator, settings: SolveSettings, limit: int) -> Iterator[Candidate]:
    """All that there are for an operator, also those that need more than `limit` bytes."""
    case = _Case(operator, settings, limit)
    if operator.squares is not None:
        yield _diagonal(case)
    yield from _decompositions(case)
    yield _cholesky(case)
    if isinstance(operator, Convolution):
        yield _banded(case, operator)
        around = operator.around
        if around is operator:
            yield _capacitance(case, operator)
        if around is not None:
            yield _circulant(case, around)
    yield _iterative(case)


class _Case:
    """What candidates are reckoned for: A `(m, n)`, what a product costs, and which side is the smaller."""

    def __init__(self, operator: LinearOperator, settings: SolveSettings, limit: int) -> None:
        self.operator, self.settings, self.limit = operator, settings, limit
        self.m, self.n = operator.size
        self.side, self.other, self.dual = min(operator.size), max(operator.size), self.m <= self.n
        self.product = PRODUCT * operator.cost
        self.vectors = WORK * (self.m + self.n)

    def candidate(
        self,
        method: Method,
        make: Callable[[], Factor],
        *,
        factor: float,
        solve: float,
        memory: int,
        kept: int,
        why_not: str = "",
    ) -> Candidate:
        over = f"needs {human(memory)} of {human(self.limit)}" if memory > self.limit else ""
        # as if all were as large as this one, in two dampings where these are factorized
        lost = max(0.0, 1 - self.limit / (self.settings.sharing * kept)) if kept else 0.0
        return Candidate(method, factor, solve, memory, lost, make, why_not or over)


def _diagonal(case: _Case) -> Candidate:
    return case.candidate(
        "diagonal",
        lambda: DiagonalFactor(case.operator),
        factor=0.0,
        solve=case.product + ENTRY * case.n,
        memory=case.vectors,
        kept=8 * case.n,
    )


def _decompositions(case: _Case) -> Iterator[Candidate]:
    m, n, side, other, groups = case.m, case.n, case.side, case.other, case.operator.groups
    kept = 8 * side * (side + other)
    yield case.candidate(
        "qr",
        lambda: QRFactor(case.operator),
        factor=ORTHOGONAL * side**2 * other,
        solve=2 * DOUBLE * (m * n + TRIANGULAR * side**2),
        memory=16 * m * n + kept,
        kept=kept,
        why_not=_large(side, case.settings),
    )
    yield case.candidate(
        "spectral",
        lambda: SpectralFactor(case.operator),
        factor=DECOMPOSITION * side**2 * other / groups**2,
        solve=2 * DOUBLE * m * n / groups,
        memory=(16 * m * n + kept) // groups,
        kept=kept // groups,
        why_not=_large(side // groups, case.settings),
    )


def _large(side: int, settings: SolveSettings) -> str:
    most = settings.direct_limit
    return f"smaller side {side} exceeds direct_limit={most}" if side > most else ""


def _cholesky(case: _Case) -> Candidate:
    side = case.side
    return case.candidate(
        "cholesky",
        lambda: GramFactor(case.operator, DenseInverse, "Cholesky factorization"),
        factor=2 * DOUBLE * (side**2 * case.other + side**3),
        solve=SQUARED * (2 * DOUBLE * side**2 + case.product),
        memory=8 * (case.m * case.n + 4 * side**2),
        kept=16 * side**2,
    )


def _banded(case: _Case, operator: Convolution) -> Candidate:
    plan = layout(operator, outputs=case.dual)

    def factorized(a: LinearOperator, shift: float) -> Inverse:
        assert isinstance(a, Convolution)
        return BlockBanded(Gram(a, outputs=case.dual), shift)

    together = operator.weight.shape[2] ** 2 * plan.groups * plan.row**2
    name = f"block LDLᵀ ({plan.blocks} blocks of {plan.groups} × {plan.block}²)"
    return case.candidate(
        "banded",
        lambda: GramFactor(operator, factorized, name),
        factor=DOUBLE * plan.factor_cost(),
        solve=SQUARED * (DOUBLE * plan.solve_cost() + case.product),
        # two dampings, a row of blocks that is worked on, and the rows from which blocks are put together
        memory=8 * (2 * plan.entries() + plan.working() + together),
        kept=16 * plan.entries(),
    )


def _capacitance(case: _Case, operator: Convolution) -> Candidate:
    cut = embedding(operator, outputs=case.dual)

    def factorized(a: LinearOperator, shift: float) -> Inverse:
        assert isinstance(a, Convolution)
        return Capacitance(a, outputs=case.dual, shift=shift)

    name = f"Fourier transforms and a capacitance matrix ({cut.side}²)"
    transforms = ENTRY * TRANSFORMS * case.side
    return case.candidate(
        "capacitance",
        lambda: GramFactor(operator, factorized, name),
        factor=DOUBLE * cut.factor_cost(),
        solve=SQUARED * (DOUBLE * (PRODUCT * cut.solve_cost() + transforms) + case.product),
        # beside it three copies of what is raised, two vectors each
        memory=cut.nbytes(BLOCK) + case.vectors + 3 * 2 * 8 * MOST * case.side,
        kept=2 * cut.kept,
    )


def _circulant(case: _Case, around: Convolution) -> Candidate:
    turned = torus(around, outputs=case.dual)

    def make() -> Factor:
        preconditioner = Circulant(around, outputs=case.dual, shift=SHIFT, floor=FLOOR)
        return IterativeFactor(case.operator, case.settings.max_iterations, preconditioner)

    vectors = ENTRY * (VECTORS * (case.m + case.n) + TRANSFORMS * case.side)
    # that of the convolution itself is put in order; then there are its Gram matrix, and the inverse of that
    symbol = turned.frequencies * math.prod([*around.weight.shape[:2], *around.options["stride"]])
    return case.candidate(
        "circulant",
        make,
        factor=DOUBLE * 8 * turned.entries * turned.channels,
        solve=PRECONDITIONED * (2 * case.product + vectors + PRODUCT * 8 * turned.entries),
        memory=16 * max(2 * symbol, symbol + 2 * turned.entries) + case.vectors,
        kept=16 * turned.entries,
    )


def _iterative(case: _Case) -> Candidate:
    return case.candidate(
        "iterative",
        lambda: IterativeFactor(case.operator, case.settings.max_iterations),
        factor=0.0,
        solve=ITERATIONS * (2 * case.product + ENTRY * VECTORS * (case.m + case.n)),
        memory=case.vectors,
        kept=0,
    )
