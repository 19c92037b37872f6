"""Which solver an operator gets: the cheapest of those that fit into memory.

Costs are counted in operations of a float32 matrix product; what runs slower counts for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch

from fxinvert.errors import SolveError
from fxinvert.linalg.anchored import Method, SolveSettings
from fxinvert.linalg.banded import BlockBanded, Gram, layout
from fxinvert.linalg.capacitance import BLOCK, Capacitance
from fxinvert.linalg.circulant import Circulant, torus
from fxinvert.linalg.convolution import Convolution
from fxinvert.linalg.embedding import embedding
from fxinvert.linalg.gram import DenseInverse, GramFactor
from fxinvert.linalg.iterative import IterativeFactor
from fxinvert.linalg.memory import full_precision, human
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.qr import QRFactor
from fxinvert.linalg.solvers import WORK, DiagonalFactor, Factor, SpectralFactor

#: how much slower than a float32 matrix product: one in float64; a decomposition into singular values; a product with
#: an operator that is not a matrix; a pass over a vector, by entry
DOUBLE, DECOMPOSITION, PRODUCT, ENTRY = 2.0, 40.0, 2.0, 40.0
#: the same for an orthogonal factorization, and for solving with a triangle
ORTHOGONAL, TRIANGULAR = 24.0, 2.0
#: operations of a factorization that nobody waits for; and what is counted for squaring the condition
PATIENCE, SQUARED = 5e9, 1.5
#: iterations that conjugate gradients are reckoned with, and with a preconditioner; how small the frequencies that it
#: amplifies may be, relative to the largest
ITERATIONS, PRECONDITIONED, SHIFT = 60, 30, 1e-5
#: vectors of either side that an iteration passes over, and of the smaller side for two Fourier transforms
VECTORS, TRANSFORMS = 6, 16

#: what is tried, in this order, where a solver does not get along with the condition of the Gram matrix
_BETTER: tuple[Method, ...] = ("banded", "qr", "spectral")
#: what solvers for some operators are for
_NEEDED: dict[Method, str] = {
    "diagonal": "it takes an operator for which AᵀA is diagonal",
    "banded": "it takes a convolution",
    "capacitance": "it takes a convolution, of maps padded by zeros",
    "circulant": "it takes a convolution, of maps padded by zeros or in a circle",
}


@dataclass(frozen=True)
class Candidate:
    """A solver as the cost model sees it.

    Attributes:
        method: its name.
        factor: operations of the factorization.
        solve: operations for one right-hand side.
        memory: bytes.
        make: makes it.
        why_not: why it cannot be taken, empty where it can.
    """

    method: Method
    factor: float
    solve: float
    memory: int
    make: Callable[[], Factor]
    why_not: str = ""

    def total(self, expected: int) -> float:
        """Operations for a number of right-hand sides, a factorization that nobody waits for not counted."""
        return max(self.factor - PATIENCE, 0) + expected * self.solve


@dataclass(frozen=True)
class Choice:
    """The candidates for an operator, and the one that is taken."""

    operator: LinearOperator
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    settings: SolveSettings

    def explain(self) -> str:
        """What is taken, what the others would have cost, and why some cannot be taken; a line each."""
        m, n = self.operator.size
        asked = " (asked for)" if self.settings.method else ""
        lines = [
            f"{type(self.operator).__name__} {m} × {n}, {self.settings.expected} solves: {self.chosen.method}{asked}"
        ]
        least = self.chosen.total(self.settings.expected)
        for c in self.candidates:
            cost = f"{c.total(self.settings.expected) / least:.2g} × the cost, {human(c.memory)}"
            lines.append(f"  {c.method}: {c.why_not or cost}")
        return "\n".join(lines)


def choose(operator: LinearOperator, settings: SolveSettings) -> Choice:
    """The solver for an operator.

    Raises:
        SolveError: the method asked for is not one, or cannot be taken, or nothing fits into the memory limit.
    """
    limit = settings.memory(operator.device)
    found = tuple(_candidates(operator, settings, limit))
    if settings.method is not None:
        if settings.method not in get_args(Method):
            raise SolveError(f"method={settings.method!r}; there are {', '.join(get_args(Method))}")
        asked = next((c for c in found if c.method == settings.method), None)
        if asked is None:
            raise SolveError(
                f"method={settings.method!r} cannot be taken: {_NEEDED[settings.method]}, which "
                f"{type(operator).__name__} {operator.size[0]} × {operator.size[1]} is not"
            )
        if asked.why_not:
            raise SolveError(f"method={settings.method!r} cannot be taken: {asked.why_not}")
        return Choice(operator, found, asked, settings)
    able = [c for c in found if not c.why_not]
    if not able:
        needed = math.ceil(min(c.memory for c in found) / settings.memory_share)
        raise SolveError(
            f"no solver for an operator {operator.size[0]} × {operator.size[1]} fits into {_told(settings, limit)}: "
            f"at least {needed} bytes ({human(needed)}) are needed"
        )
    return Choice(operator, found, min(able, key=lambda c: c.total(settings.expected)), settings)


def _told(settings: SolveSettings, limit: int) -> str:
    if settings.memory_share == 1 or settings.memory_limit is None:
        return f"memory_limit={limit}"
    return f"the {human(limit)} of memory_limit={settings.memory_limit} that are for solvers"


def factorize(operator: LinearOperator, settings: SolveSettings) -> Factor:
    """The operator made ready for many right-hand sides, by the solver that costs least.

    Where a Gram matrix turns out to be too ill-conditioned for that, it is factorized in blocks, which loses least, or A itself is
    decomposed instead, as far as that can be afforded: by QR if it has full rank, else into singular values.

    Raises:
        SolveError: nothing fits into the memory limit, or the operator has NaN or infinite values.
    """
    with full_precision(operator.device):
        return _factorized(operator, settings)


def _factorized(operator: LinearOperator, settings: SolveSettings) -> Factor:
    choice = choose(operator, settings)
    factor = _made(choice.chosen, operator, settings)
    told = choice.explain()
    if settings.method is None and isinstance(factor, GramFactor) and factor.strained:
        factor, more = _better(factor, choice)
        told += more
    factor.chosen = f"{told}\n  {factor.explain()}"
    return factor


def _better(factor: GramFactor, choice: Choice) -> tuple[Factor, str]:
    """Another factorization that rounding does less to, the first that it does little to, if one fits beside; and what was tried."""
    operator, settings, told = choice.operator, choice.settings, ""
    left = settings.memory(operator.device) - factor.nbytes
    able = {c.method: c for c in choice.candidates if not c.why_not and c.memory <= left}
    for method in (m for m in _BETTER if m in able and m != choice.chosen.method):
        try:
            better = _made(able[method], operator, settings, factor.nbytes)
        except SolveError as error:
            told += f"\n  {method} was tried: {error}"
            continue
        if isinstance(better, GramFactor) and better.rounding >= factor.rounding:
            told += f"\n  {method} was tried: the Gram matrix is too ill-conditioned for it, too"
            continue
        told += f"\n  {method} was taken: the Gram matrix is too ill-conditioned"
        if not isinstance(better, GramFactor) or not better.strained:
            return better, told
        factor = better
    return factor, told


def _made(candidate: Candidate, operator: LinearOperator, settings: SolveSettings, held: int = 0) -> Factor:
    """A candidate's factorization, beside another one that holds so many bytes; room is made for it if a limit is set."""
    if settings.memory_limit is not None:
        settings.ledger.reserve(held + candidate.memory, operator.device)
    return candidate.make()


def _candidates(operator: LinearOperator, settings: SolveSettings, limit: int) -> list[Candidate]:
    m, n = operator.size
    side, other = min(m, n), max(m, n)
    product = PRODUCT * operator.cost
    dual = m <= n
    shape = operator.out_shape if dual else operator.in_shape

    def fits(memory: int, why_not: str = "") -> str:
        return why_not or (f"needs {human(memory)} of {human(limit)}" if memory > limit else "")

    def cholesky() -> Factor:
        a = operator.to(torch.float64).dense()
        gram = a @ a.T if dual else a.T @ a
        return GramFactor(
            operator, lambda shift: DenseInverse(gram, shape, shift), "Cholesky factorization", gram.nbytes
        )

    def banded() -> Factor:
        assert isinstance(operator, Convolution)
        gram = Gram(operator, outputs=dual)
        name = f"block LDLᵀ ({gram.layout.blocks} blocks of {gram.layout.groups} × {gram.layout.block}²)"
        return GramFactor(operator, lambda shift: BlockBanded(gram, shift), name)

    def capacitance() -> Factor:
        assert isinstance(operator, Convolution)
        name = f"Fourier transforms and a capacitance matrix ({cut.side}²)"
        return GramFactor(operator, lambda shift: Capacitance(operator, outputs=dual, shift=shift), name)

    def circulant() -> Factor:
        assert around is not None
        preconditioner = Circulant(around, outputs=dual, shift=SHIFT)
        return IterativeFactor(operator, settings.max_iterations, preconditioner)

    entries = 8 * (2 * m * n + side * (side + other))
    large = f"smaller side {side} exceeds direct_limit={settings.direct_limit}"
    found = []
    if operator.squares is not None:
        memory = WORK * (m + n)
        found.append(
            Candidate(
                "diagonal", 0.0, product + ENTRY * n, memory, lambda: DiagonalFactor(operator), fits(memory)
            )
        )
    found.append(
        Candidate(
            "qr",
            ORTHOGONAL * side**2 * other,
            2 * DOUBLE * (m * n + TRIANGULAR * side**2),
            entries,
            lambda: QRFactor(operator),
            fits(entries, large if side > settings.direct_limit else ""),
        )
    )
    found.append(
        Candidate(
            "spectral",
            DECOMPOSITION * side**2 * other,
            2 * DOUBLE * m * n,
            entries,
            lambda: SpectralFactor(operator),
            fits(entries, large if side > settings.direct_limit else ""),
        )
    )
    entries = 8 * (m * n + 4 * side**2)
    found.append(
        Candidate(
            "cholesky",
            2 * DOUBLE * (side**2 * other + side**3),
            SQUARED * (2 * DOUBLE * side**2 + product),
            entries,
            cholesky,
            fits(entries),
        )
    )
    if isinstance(operator, Convolution):
        plan = layout(operator, outputs=dual)
        # two dampings, and the rows from which blocks are put together
        entries = 8 * 2 * plan.entries() + 8 * operator.weight.shape[2] ** 2 * plan.groups * plan.row**2
        found.append(
            Candidate(
                "banded",
                DOUBLE * plan.factor_cost(),
                SQUARED * (DOUBLE * plan.solve_cost() + product),
                entries,
                banded,
                fits(entries),
            )
        )
    around = operator.around if isinstance(operator, Convolution) else None
    if isinstance(operator, Convolution) and around is operator:
        cut = embedding(operator, outputs=dual)
        entries = cut.nbytes(BLOCK) + WORK * (m + n)
        found.append(
            Candidate(
                "capacitance",
                DOUBLE * cut.factor_cost(),
                SQUARED * (DOUBLE * (PRODUCT * cut.solve_cost() + ENTRY * TRANSFORMS * side) + product),
                entries,
                capacitance,
                fits(entries),
            )
        )
    if around is not None:
        turned = torus(around, outputs=dual)
        entries = 3 * 16 * turned.entries + WORK * (m + n)
        found.append(
            Candidate(
                "circulant",
                DOUBLE * 8 * turned.entries * turned.channels,
                PRECONDITIONED
                * (
                    2 * product
                    + ENTRY * (VECTORS * (m + n) + TRANSFORMS * side)
                    + PRODUCT * 8 * turned.entries
                ),
                entries,
                circulant,
                fits(entries),
            )
        )
    entries = WORK * (m + n)
    found.append(
        Candidate(
            "iterative",
            0.0,
            ITERATIONS * (2 * product + ENTRY * VECTORS * (m + n)),
            entries,
            lambda: IterativeFactor(operator, settings.max_iterations),
            fits(entries),
        )
    )
    return found
