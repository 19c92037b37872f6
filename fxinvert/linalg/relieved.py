"""A Gram matrix too ill-conditioned for small answers, and a decomposition of A itself that is made when one is asked for.

An answer that is blown up is given up for a damped one (`anchored.py`), and damped systems are well-conditioned. The Gram
matrix, shifted by μ, suffices to tell so: conjugate gradients that it preconditions have iterates x no longer than the
solution d in the norm of AᵀA + μI (Hestenes & Stiefel 1952, §5), so that ‖d‖² ≥ ‖x‖² − ‖r‖²/μ. Where it needed no shift,
refined answers may be known to be near the exact ones (`gram.py`), and are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fxinvert.linalg.gram import GramFactor
from fxinvert.linalg.solvers import Factor, Solution
from fxinvert.linalg.vectors import norm

#: how far beyond the limit an iterate has to be: at that ‖r‖²/μ is small beside ‖x‖², for shifts of 1e-9 σ_max² and κ = 1e3
BEYOND = 64.0


class Relieved(Factor):
    """Solves with a strained Gram matrix what that can tell, and the rest with another factorization.

    Args:
        gram: it.
        better: makes the other one.
    """

    def __init__(self, gram: GramFactor, better: Callable[[], Factor]) -> None:
        super().__init__(gram.operator)
        self.largest = gram.largest
        self._gram, self._make = gram, better
        self._better: Factor | None = None

    @property
    def nbytes(self) -> int:
        return self._gram.nbytes + (self._better.nbytes if self._better else 0)

    def explain(self) -> str:
        return f"{self._gram.explain()}, for samples that are blown up and damped"

    def solve(self, r: Tensor, damping: float, limit: float = math.inf) -> Solution:
        if self._better and not damping:
            return self._better.solve(r, damping, limit)
        found, size = self._gram.solve(r, damping, BEYOND * limit), norm(r)
        if not damping:
            settled = (size == 0) | ~(self.largest * norm(found.correction) <= BEYOND * limit * size)
            settled = settled if found.near is None else settled | found.near
        elif found.converged is not None:
            settled = found.converged
        else:
            return found
        if bool(settled.all()):
            return Solution(found.correction, found.iterations, settled)
        self._better = self._better or self._make()
        rest = self._better.solve(r[~settled], damping, limit)
        correction, converged = found.correction.clone(), settled.clone()
        correction[~settled] = rest.correction
        converged[~settled] = True if rest.converged is None else rest.converged
        return Solution(correction, max(found.iterations, rest.iterations), converged)
