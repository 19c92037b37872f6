"""Sums over the rows of an op, a block of samples at a time, in the form that their number of features asks for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fxinvert.linalg.memory import full_precision
from fxinvert.training.statistics import NormalEquations
from fxinvert.training.wide import WideEquations

#: bytes of patches that are made at a time
BLOCK = 2**24
#: the largest Gram matrix that is held, in bytes; a solution needs three of that size
LARGEST = 2**30

Equations = NormalEquations | WideEquations


def equations(features: Tensor, errors: Tensor, weights: Tensor) -> Equations:
    """The sums over some rows, by a Gram matrix unless that were too large; arguments as for `NormalEquations.of`."""
    groups, _, n = features.shape
    kind = NormalEquations if groups * n * n * 8 <= LARGEST else WideEquations
    with full_precision(features.device):
        return kind.of(features, errors, weights)


def equations_over(
    features: Callable[[slice], Tensor], errors: Tensor, weights: Tensor, samples: int
) -> Equations:
    """The same, the features made for a few samples at a time, so that patches of a whole batch are never held.

    Args:
        features: ã of a slice of the samples, `(groups, its rows, n)`, samples in order.
        errors: t − y of all of them, `(groups, rows, m)`.
        weights: `(samples,)`, or one for every row.
        samples: their number.
    """
    per_sample = errors.shape[1] // max(samples, 1)
    each = len(weights) // max(samples, 1)
    total: Equations | None = None
    step, first = 1, 0
    while total is None or first < samples:
        rows = features(slice(first, first + step))
        of_rows = slice(first * per_sample, first * per_sample + rows.shape[1])
        part = equations(rows, errors[:, of_rows], weights[first * each : (first + step) * each])
        total = part if total is None else added(total, part)
        first += step
        step = max(1, BLOCK * step // max(1, rows.nbytes)) if first == 1 else step
    return total


def added(total: Equations, more: Equations) -> Equations:
    """The sum of two sums over rows of the same op, which have the same form."""
    return total + more  # type: ignore[operator]
