"""Gram matrices of rows, G = Σ w ã ãᵀ, and those of the patches under a kernel through their shift structure.

What one tap of a kernel sees at a position, the next tap has seen a few positions earlier: F_{u+1}(i) = F_u(i + s), with F_u(i) the
channels under tap u at position i < P along an axis, and s the dilation over the stride. So blocks of G along a diagonal
differ by what the ends of the map contribute,

    G_{u+1,v+1} = G_{u,v} + Σ_{i ≥ P−s} F_{u+1}(i) F_{v+1}(i)ᵀ − Σ_{i < s} F_u(i) F_v(i)ᵀ,

and only for the lags u − v, 2k − 1 of them for k taps instead of k², a product over the whole map is needed; each of these has the
same structure along the next axis, and the ends have it too. Nothing is asked of what lies beyond the map: any padding will do. For one
axis and one channel this is the covariance method of linear prediction (Morf, Dickinson, Kailath, Vieira, IEEE ASSP 25, 1977).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: rows in a product, before its sum is carried on in float64
ROWS = 2**11
#: columns of a block of G: of a symmetric matrix of blocks one half is computed
COLUMNS = 256
#: products of few columns take as long as if their entries were so many more
OVERHEAD = 1500
#: what an entry of G costs to be put together from lags, in multiply-adds
ASSEMBLY = 700
#: how many times cheaper lags must promise to be
GAIN = 1.15

#: sums of products; what adds up: a tensor, or, along every axis, those for pairs of taps and the change from tap to tap
Products = Any


@dataclass(frozen=True)
class Shifts:
    """How patches are laid out: columns are `(channels, *kernel)` and perhaps a 1, rows `(samples, *positions)`.

    Attributes:
        kernel: taps along every axis.
        positions: of the kernel along every axis.
        steps: after how many positions a tap sees what the next one saw, along every axis.
    """

    kernel: tuple[int, ...]
    positions: tuple[int, ...]
    steps: tuple[int, ...]

    def pay(self, n: int, rows: int) -> bool:
        """Whether sums over some rows of n columns cost less by lags."""
        channels = n // math.prod(self.kernel)
        direct = rows * (n * (n + min(n, COLUMNS)) / 2 + OVERHEAD)
        return GAIN * (rows * self._cost(channels, symmetric=True) + ASSEMBLY * n**2) < direct

    def _cost(self, channels: int, *, symmetric: bool, axis: int = 0) -> float:
        """Multiply-adds for every row."""
        if axis == len(self.kernel):
            return channels**2 + OVERHEAD
        taps, share = self.kernel[axis], min(1.0, self.steps[axis] / self.positions[axis])
        found = (taps if symmetric else 2 * taps - 1) * self._cost(channels, symmetric=False, axis=axis + 1)
        if taps > 1:
            found += 2 * share * self._cost((taps - 1) * channels, symmetric=symmetric, axis=axis + 1)
        return found


def products(features: Tensor, weighted: Tensor, shifts: Shifts | None, onto: Products = None) -> Products:
    """The sums that G is put together from, of some rows.

    Args:
        features: ã, `(groups, rows, n)`.
        weighted: w ã.
        shifts: their structure; None: there is none, or it would not pay.
        onto: those of other rows, which these are added to, in place.
    """
    x, y = weighted.mT, features.mT
    if shifts is None:
        return product(x, y, symmetric=True, onto=onto)
    of_lags, of_ones = (None, None) if onto is None else onto
    axes, size = len(shifts.kernel), math.prod(shifts.kernel)
    channels, samples = x.shape[1] // size, x.shape[2] // math.prod(shifts.positions)
    ones = product(x, y[:, channels * size :], onto=of_ones)
    x, y = (
        value[:, : channels * size]
        .reshape(len(value), channels, *shifts.kernel, samples, *shifts.positions)
        .movedim(1, 1 + axes)
        for value in (x, y)
    )
    return _lags(x, y, shifts.steps, symmetric=True, onto=of_lags), ones


def gram(found: Products, shifts: Shifts | None) -> Tensor:
    """G, `(groups, n, n)` in float64, with the columns of the features."""
    if shifts is None:
        return _assembled(found, 0, symmetric=True)
    (lags, ones), axes = found, len(shifts.kernel)
    patches = _assembled(lags, axes, symmetric=True).movedim((1 + axes, 2 + 2 * axes), (1, 2 + axes))
    groups, n, more = ones.shape
    made: Tensor = ones.new_empty(groups, n, n)
    width = n - more
    made[:, :width, :width] = patches.reshape(groups, width, width)
    made[:, :, width:], made[:, width:] = ones, ones.mT
    return made


def product(x: Tensor, y: Tensor, *, symmetric: bool = False, onto: Tensor | None = None) -> Tensor:
    """x yᵀ of `(groups, m, rows)`, `(groups, n, rows)` in float64, added to `onto`; of a symmetric one, blocks below the
    diagonal are left out."""
    made = x.new_zeros(len(x), x.shape[1], y.shape[1], dtype=torch.float64) if onto is None else onto
    wide = COLUMNS if symmetric else max(made.shape[1], 1)
    for rows in range(0, x.shape[2], ROWS):
        left, right = (value[..., rows : rows + ROWS] for value in (x, y))
        for first in range(0, made.shape[1], wide):
            start = first if symmetric else 0
            made[:, first : first + wide, start:] += left[:, first : first + wide] @ right[:, start:].mT
    return made


def _lags(x: Tensor, y: Tensor, steps: Sequence[int], *, symmetric: bool, onto: Products) -> Products:
    """The products for x yᵀ over samples and positions.

    Args:
        x, y: `(groups, *kernel, c, samples, *positions)`; the axes of the kernel are the last ones of the positions.
        steps: along these axes.
        symmetric: whether x yᵀ is.
        onto: the products that these are added to.
    """
    if not steps:
        return product(x.flatten(2), y.flatten(2), symmetric=symmetric, onto=onto)
    axes, taps, positions = len(steps), x.shape[1], x.shape[-len(steps)]
    pairs = _pairs(taps, symmetric)
    of_lags, of_ends = ([None] * len(pairs), None) if onto is None else onto
    lags = [
        _lags(x[:, u], y[:, v], steps[1:], symmetric=symmetric and u == v, onto=own)
        for (u, v), own in zip(pairs, of_lags, strict=True)
    ]
    if taps == 1:
        return lags, []
    step = min(steps[0], positions)

    def end(value: Tensor, tap: int, position: int) -> Tensor:
        # these taps have no lags: they are channels
        taken = value.narrow(1, tap, taps - 1).narrow(-axes, position, step)
        return taken.movedim(1, axes).flatten(axes, 1 + axes)

    last, first = ([end(value, *at) for value in (x, y)] for at in ((1, positions - step), (0, 0)))
    # as if they were other samples
    left, right = torch.cat([last[0], first[0]], 1 + axes), torch.cat([last[1], -first[1]], 1 + axes)
    return lags, _lags(left, right, steps[1:], symmetric=symmetric, onto=of_ends)


def _pairs(taps: int, symmetric: bool) -> list[tuple[int, int]]:
    """One pair of taps for every lag; of symmetric ones, half of them."""
    return [(0, v) for v in range(taps)] + [(u, 0) for u in range(1, taps) if not symmetric]


def _assembled(found: Products, axes: int, *, symmetric: bool) -> Tensor:
    """`(groups, *kernel, c, *kernel, c)`."""
    if not axes:
        whole: Tensor = found
        if symmetric:
            for first in range(COLUMNS, whole.shape[1], COLUMNS):
                whole[:, first : first + COLUMNS, :first] = whole[:, :first, first : first + COLUMNS].mT
        return whole
    lags, change = found
    taps = len(lags) if symmetric else (len(lags) + 1) // 2
    blocks = [_assembled(own, axes - 1, symmetric=symmetric and i == 0) for i, own in enumerate(lags)]
    groups, *shape = blocks[0].shape
    made = blocks[0].new_empty(groups, taps, *shape[:axes], taps, *shape[axes:])

    def block(u: int, v: int) -> Tensor:
        return made.select(1, u).select(1 + axes, v)

    for (u, v), own in zip(_pairs(taps, symmetric), blocks, strict=True):
        block(u, v).copy_(own)
    if taps > 1:
        ends = _assembled(change, axes - 1, symmetric=symmetric)
        side = (*shape[: axes - 1], taps - 1, shape[axes - 1])
        # (groups, *kernel, taps, c, …) → (groups, taps, *kernel, c, …)
        ends = ends.reshape(groups, *side, *side).movedim((axes, 1 + 2 * axes), (1, 2 + axes))
        for u in range(1, taps):
            for v in range(u if symmetric else 1, taps):
                own = ends.select(1, u - 1).select(1 + axes, v - 1)
                torch.add(block(u - 1, v - 1), own, out=block(u, v))
    if symmetric:
        for u in range(1, taps):
            for v in range(u):
                turned = range(1 + axes, 1 + 2 * axes), range(1, 1 + axes)
                block(u, v).copy_(block(v, u).permute(0, *turned[0], *turned[1]))
    return made
