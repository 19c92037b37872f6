"""Sums over the rows of an op, a block of samples at a time, in the form that their number of features asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from torch import Tensor

from fxinvert.linalg.memory import full_precision
from fxinvert.training.grams import Shifts
from fxinvert.training.statistics import NormalEquations
from fxinvert.training.wide import WideEquations

#: bytes of patches that are made at a time
BLOCK = 2**24
#: the largest Gram matrix that is held, in bytes; a solution needs three of that size
LARGEST = 2**30

Equations = NormalEquations | WideEquations


def equations(
    features: Tensor | Iterable[Tensor], errors: Tensor, weights: Tensor, shifts: Shifts | None = None
) -> Equations:
    """The sums over some rows, by a Gram matrix unless that were too large; arguments as for `NormalEquations.over`."""
    parts = iter([features] if isinstance(features, Tensor) else features)
    begun = next(parts)
    groups, _, n = begun.shape
    with full_precision(begun.device):
        if groups * n * n * 8 <= LARGEST:
            return NormalEquations.over(chain([begun], parts), errors, weights, shifts)
        return WideEquations.over(chain([begun], parts), errors, weights)


def equations_over(
    features: Callable[[slice], Tensor],
    errors: Tensor,
    weights: Tensor,
    samples: int,
    shifts: Shifts | None = None,
) -> Equations:
    """The same, the features made for a few samples at a time, so that patches of a whole batch are never held.

    Args:
        features: ã of a slice of the samples, `(groups, its rows, n)`, samples in order.
        errors: t − y of all of them, `(groups, rows, m)`.
        weights: `(samples,)`, or one for every row.
        samples: their number.
        shifts: the structure of patches at all positions, by which G is found where that is cheaper.
    """

    def parts() -> Iterator[Tensor]:
        step, first = 1, 0
        while first == 0 or first < samples:
            rows = features(slice(first, first + step))
            yield rows
            first += step
            step = max(1, BLOCK * step // max(1, rows.nbytes)) if first == 1 else step

    return equations(parts(), errors, weights, shifts)


def added(total: Equations, more: Equations) -> Equations:
    """The sum of two sums over rows of the same op, which have the same form."""
    return total + more  # type: ignore[operator]
