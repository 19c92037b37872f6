"""A map on a torus that is just so large that no window wraps onto it, and what of the torus lies beyond the map."""

from __future__ import annotations

import math
from typing import NamedTuple

from fxinvert.linalg.circulant import Torus
from fxinvert.linalg.convolution import Convolution


class Embedding(NamedTuple):
    """A Gram matrix's unknowns (`own`) and what couples them (`other`), on one torus.

    Attributes:
        own: the side of the Gram matrix.
        other: the other one.
        channels: of `own`, then of `other`, those of a side that does not fill the torus.
        counts: by axis, how many positions of the torus belong to the map, for every one of these channels.
    """

    own: Torus
    other: Torus
    channels: slice
    counts: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.own.sizes

    @property
    def frequencies(self) -> int:
        """Frequencies of the torus, of real values."""
        return self.own.frequencies

    def reach(self, axis: int) -> int:
        """Positions along an axis that lie beyond the map in some channel."""
        return self.sizes[axis] - min(self.counts[axis], default=self.sizes[axis])

    def inside(self, axes: int) -> list[int]:
        """For every channel, the positions along the first axes that belong to the map."""
        return [math.prod(counts[i] for counts in self.counts[:axes]) for i in range(len(self.counts[0]))]

    def beyond(self, axis: int) -> int:
        """What lies beyond the map along an axis, but on it along those before, at one position along those after."""
        outside = (self.sizes[axis] - count for count in self.counts[axis])
        return sum(a * b for a, b in zip(self.inside(axis), outside, strict=True))

    @property
    def side(self) -> int:
        """Of the dense matrix, that of the last axis."""
        return self.beyond(len(self.sizes) - 1)

    @property
    def edge(self) -> int:
        """Entries at one position along the last axis."""
        return sum(self.inside(len(self.sizes) - 1))

    @property
    def kept(self) -> int:
        """Bytes of a factorization."""
        n, around = len(self.sizes), self.channels.stop - self.own.channels
        spectra = 16 * self.frequencies * self.own.channels * (self.own.channels + around)
        later = [math.prod(self.sizes[axis + 1 : -1]) * (self.sizes[-1] // 2 + 1) for axis in range(n - 1)]
        near = [self.beyond(axis) for axis in range(n - 1)]
        earlier = sum(16 * many * side**2 for many, side in zip(later, near, strict=True))
        kept: int = self.own.groups * (spectra + earlier + 8 * self.side**2)
        return kept

    def nbytes(self, block: int) -> int:
        """Bytes of two factorizations, and of making one of them in blocks of so many complex numbers."""
        groups, channels, n = self.own.groups, len(self.counts[0]), len(self.sizes)
        near = [self.beyond(axis) for axis in range(n - 1)]
        made = groups * 16 * self.frequencies * (channels**2 + 4 * self.own.channels**2)
        lags = groups * 8 * self.reach(n - 1) * self.edge**2
        whole = groups * 8 * (sum(self.inside(n - 2)) * self.sizes[-2]) ** 2 if n > 1 else 0
        blocks = 5 * 16 * max(block, groups * self.edge * max(near, default=0))
        return 2 * (self.kept + made) + lags + 4 * whole + blocks

    def factor_cost(self) -> float:
        """Operations of a factorization: of the dense matrix, and of putting it together."""
        near = sum(self.beyond(axis) for axis in range(len(self.sizes) - 1))
        frequencies = self.sizes[-1] // 2 + 1
        together = frequencies * self.edge**2 * (8 * near + 32 * self.reach(len(self.sizes) - 1))
        return self.own.groups * (2 / 3 * self.side**3 + together)

    def solve_cost(self) -> float:
        """Operations of one solve for one sample, but for Fourier transforms."""
        channels = self.own.channels * (self.own.channels + 2 * len(self.counts[0]))
        products: float = 2.0 ** len(self.sizes) * 8 * self.frequencies * channels
        return self.own.groups * (2.0 * self.side**2 + products)


def embedding(operator: Convolution, *, outputs: bool) -> Embedding:
    """The embedding for AAᵀ (`outputs`) or AᵀA."""
    options, sizes = operator.options, []
    # what a convolution calls its inputs is the finer side; for a transposed one that is its output
    fine_shape, coarse_shape = operator.in_shape, operator.out_shape
    if not operator.forward:
        fine_shape, coarse_shape = coarse_shape, fine_shape
    kernel, strides, dilations = operator.weight.shape[2:], options["stride"], options["dilation"]
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
        size, count, before = fine_shape[1 + axis], coarse_shape[1 + axis], operator.padding[axis]
        end = (count - 1) * s - before + d * (k - 1) + 1  # of the last window
        sizes.append(max(count, -(-(size + before) // s), -(-end // s)))
    fine = Torus(fine_shape, options["groups"], tuple(strides), tuple(sizes))
    coarse = Torus(coarse_shape, options["groups"], (1,) * len(sizes), tuple(sizes))
    own, other = (fine, coarse) if outputs != operator.forward else (coarse, fine)
    first, last = (
        own.channels if own.full else 0,
        own.channels + (0 if other.full else other.channels),
    )
    counts = [[*mine, *theirs] for mine, theirs in zip(own.inside(), other.inside(), strict=True)]
    return Embedding(own, other, slice(first, last), tuple(tuple(c[first:last]) for c in counts))
