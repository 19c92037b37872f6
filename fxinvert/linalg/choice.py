"""Which solver an operator gets: the cheapest of those that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from fxinvert.errors import SolveError
from fxinvert.linalg.anchored import Method, SolveSettings
from fxinvert.linalg.candidates import Candidate, candidates
from fxinvert.linalg.gram import GramFactor
from fxinvert.linalg.memory import free_memory, full_precision, human
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.relieved import Relieved
from fxinvert.linalg.solvers import Factor

#: what is tried, in this order, where a solver does not get along with the condition of the Gram matrix
_BETTER: tuple[Method, ...] = ("banded", "qr", "spectral")
#: operations from which such a solver is made only when a sample needs it
DEAR = 1e11
#: what solvers for some operators are for
_NEEDED: dict[Method, str] = {
    "diagonal": "it takes an operator for which AᵀA is diagonal",
    "banded": "it takes a convolution",
    "capacitance": "it takes a convolution, of maps padded by zeros",
    "circulant": "it takes a convolution, of maps padded by zeros or in a circle",
}


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
        SolveError: the method asked for is not one, or cannot be taken, or nothing fits into the memory limit, or into the
            memory that is free where none is set.
    """
    limit = settings.memory(operator.device)
    found = tuple(candidates(operator, settings, limit))
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
    if not able and settings.memory_limit is None:
        # nobody has set a limit: the one that takes least may have all that is free
        found = tuple(candidates(operator, settings, free_memory(operator.device)))
        able = sorted((c for c in found if not c.why_not), key=lambda c: c.memory)[:1]
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
    decomposed instead, as far as that can be afforded: by QR if it has full rank, else into singular values. What takes long
    waits for a sample that needs it (`relieved.py`).

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
        gram, able = factor, _able(factor, choice)
        if any(c.factor > DEAR for c in able.values()):
            factor = Relieved(gram, lambda: _better(gram, choice, able)[0])
            told += (
                f"\n  {', '.join(able)}: when a sample needs it, for the Gram matrix is too ill-conditioned"
            )
        else:
            factor, more = _better(gram, choice, able)
            told += more
    factor.chosen = f"{told}\n  {factor.explain()}"
    return factor


def _able(factor: GramFactor, choice: Choice) -> dict[Method, Candidate]:
    """The candidates that rounding may do less to and that fit beside, in the order in which they are tried."""
    left = choice.settings.memory(choice.operator.device) - factor.nbytes
    # one that would have to be made again and again is worth it only where refining may lead nowhere
    lost = 1.0 if factor.rounding >= 1 else 0.0
    able = {c.method: c for c in choice.candidates if not c.why_not and c.memory <= left and c.lost <= lost}
    return {method: able[method] for method in _BETTER if method in able and method != choice.chosen.method}


def _better(factor: GramFactor, choice: Choice, able: Mapping[Method, Candidate]) -> tuple[Factor, str]:
    """The first of other factorizations that rounding does little to, or the one that it does least to; and what was tried."""
    operator, settings, told = choice.operator, choice.settings, ""
    for method, candidate in able.items():
        try:
            better = _made(candidate, operator, settings, factor.nbytes)
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
