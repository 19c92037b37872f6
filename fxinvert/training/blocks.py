"""Sums over the rows of an op, a block of samples at a time, in the form that their number of features asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from fxinvert.linalg.memory import full_precision
from fxinvert.training.grams import Shifts
from fxinvert.training.lookups import LookupEquations
from fxinvert.training.statistics import NormalEquations
from fxinvert.training.wide import WideEquations

#: bytes of patches that are made at a time
BLOCK = 2**24

Equations = NormalEquations | WideEquations | LookupEquations


def equations(
    features: Iterable[Tensor],
    errors: Tensor,
    weights: Tensor,
    shifts: Shifts | None = None,
    kept: int | None = None,
) -> Equations:
    """The sums over some rows.

    Args:
        features, errors, weights, shifts: as for `NormalEquations.over`.
        kept: so many rows are kept in place of a Gram matrix; None: a Gram matrix.
    """
    with full_precision(errors.device):
        if kept is None:
            return NormalEquations.over(features, errors, weights, shifts)
        return WideEquations.over(features, errors, weights, kept)


def equations_over(
    features: Callable[[slice], Tensor],
    errors: Tensor,
    weights: Tensor,
    samples: int,
    shifts: Shifts | None = None,
    kept: int | None = None,
    block: int = BLOCK,
) -> Equations:
    """The same, the features made for a few samples at a time, so that patches of a whole batch are never held.

    Args:
        features: ã of a slice of the samples, `(groups, its rows, n)`, samples in order.
        errors: t − y of all of them, `(groups, rows, m)`.
        weights: `(samples,)`, or one for every row.
        samples: their number.
        shifts: the structure of patches at all positions, by which G is found where that is cheaper.
        kept: see `equations`.
        block: bytes of features that are made at a time.
    """

    def parts() -> Iterator[Tensor]:
        step, first = 1, 0
        while first == 0 or first < samples:
            rows = features(slice(first, first + step))
            yield rows
            first += step
            step = max(1, block * step // max(1, rows.nbytes)) if first == 1 else step

    return equations(parts(), errors, weights, shifts, kept)


def added(total: Equations, more: Equations) -> Equations:
    """The sum of two sums over rows of the same op, which have the same form; the first is overwritten."""
    total += more  # type: ignore[operator]
    return total
