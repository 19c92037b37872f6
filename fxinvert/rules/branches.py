"""One mechanism for every scalar function: its monotone branches.

A scalar function is described by the intervals on which it is monotone or constant. The nearest pre-image of a target
is then found without any code of the function's own: take each branch's best candidate (the target, moved into the
branch's image, and inverted there; on a constant branch the anchor, moved into the branch's domain) and the anchor
itself, and keep the candidate that comes closest to the target and, among those that come equally close, the one
closest to the anchor:

    x* = argmin_x |f(x) − t|, ties by |x − x0|,

which is the anchored equation with λ → 0 for a function of one variable. Batches are worked through in blocks that fit
the processor's cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.op import Op

Scalar = Callable[[Tensor], Tensor]
Number = float | Tensor

#: How near an answer may come to an end of an image that is only reached at infinity, relative to the image's width
#: (absolute where the image is unbounded). It applies to targets beyond that end: they have no pre-image at all.
MARGIN = 1e-6
#: values that are worked on at once
BLOCK = 16384
#: makes any difference in the distance from the target count for more than the distance from the anchor
FIRST = 1e30


@dataclass(frozen=True)
class Branch:
    """An interval on which a scalar function is monotone or constant; ends are numbers, or tensors that broadcast.

    Attributes:
        low, high: ends of the interval of x.
        least, most: ends of its image, the smaller first.
        inverse: the pre-image nearest the anchor, of a value of the image and the anchor.
        open_least, open_most: whether that end of the image is only approached, at infinity. It is never returned.
        open_low, open_high: whether that end of the interval does not belong to it: a pole or a jump.
    """

    low: Number
    high: Number
    least: Number
    most: Number
    inverse: Callable[[Tensor, Tensor], Tensor]
    open_least: bool = False
    open_most: bool = False
    open_low: bool = False
    open_high: bool = False

    def candidate(self, target: Tensor, anchor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The branch's best pre-image, for an answer in `dtype`, and the value the function takes there."""
        value = within(target, self.least, self.most)
        if self.open_least and not bool(value.amin() > self.least):
            value = torch.where(value <= self.least, self.least + self._margin, value)
        if self.open_most and not bool(value.amax() < self.most):
            value = torch.where(value >= self.most, self.most - self._margin, value)
        low = _off(self.low, 1, dtype) if self.open_low else self.low
        high = _off(self.high, -1, dtype) if self.open_high else self.high
        return within(self.inverse(value, anchor), low, high), value

    @property
    def _margin(self) -> float:
        if isinstance(self.least, Tensor) or isinstance(self.most, Tensor):
            return MARGIN
        width = self.most - self.least
        return MARGIN * (width if math.isfinite(width) else 1.0)


def flat(low: Number, high: Number, value: Number) -> Branch:
    """The function is constant on [low, high]."""
    return Branch(low, high, value, value, lambda y, anchor: anchor)


def rising(low: Number, high: Number, image: tuple[Number, Number], inverse: Scalar) -> Branch:
    """The function increases on [low, high], onto `image`."""
    return _monotone(low, high, image, inverse, increasing=True)


def falling(low: Number, high: Number, image: tuple[Number, Number], inverse: Scalar) -> Branch:
    """The function decreases on [low, high], onto `image` (smaller end first)."""
    return _monotone(low, high, image, inverse, increasing=False)


def periodic(period: float, image: tuple[float, float], inverse: Scalar) -> Branch:
    """The function repeats itself; `inverse` gives one pre-image, the nearest is a number of periods away."""

    def nearest(y: Tensor, anchor: Tensor) -> Tensor:
        x = inverse(y)
        return x + period * torch.round((anchor - x) / period)

    return Branch(-math.inf, math.inf, *image, nearest)


def _monotone(
    low: Number, high: Number, image: tuple[Number, Number], inverse: Scalar, *, increasing: bool
) -> Branch:
    at_low, at_high = image if increasing else image[::-1]
    # an end of the image at infinity needs no margin: no target lies beyond it
    approached = _infinite(low) and not _infinite(at_low), _infinite(high) and not _infinite(at_high)
    return Branch(
        low,
        high,
        *image,
        lambda y, anchor: inverse(y),
        *(approached if increasing else approached[::-1]),
        open_low=_infinite(at_low) and not _infinite(low),
        open_high=_infinite(at_high) and not _infinite(high),
    )


def _infinite(end: Number) -> bool:
    return not isinstance(end, Tensor) and math.isinf(end)


def _off(end: Number, direction: int, dtype: torch.dtype) -> Number:
    """The number next to an end that does not belong to the interval."""
    digits = torch.finfo(dtype)
    size = end.abs() if isinstance(end, Tensor) else abs(end)
    return end + direction * (size * digits.eps + digits.tiny)


def within(value: Tensor, low: Number, high: Number) -> Tensor:
    """`value` moved into [low, high], whose ends are numbers or tensors."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        ends = (torch.as_tensor(end, dtype=value.dtype, device=value.device) for end in (low, high))
        return torch.clamp(value, *ends)
    least, most = (None if math.isinf(end) else end for end in (low, high))
    return value if least is None and most is None else value.clamp(least, most)


def invert_branches(op: Op, target: Tensor, branches: tuple[Branch, ...]) -> Inverse:
    """Nearest pre-image of `target` over all branches, entry by entry.

    The anchor is the first candidate, so an entry moves only if that brings the output closer to the target.
    """
    anchor = op.anchor
    value = torch.empty_like(anchor)
    residual, distance = row_norms(value).zero_(), row_norms(value).zero_()
    outside = 0
    for rows in _blocks(op):
        x, t = anchor[rows], target[rows]
        # half precisions cannot tell 1 from 1 − MARGIN
        working = torch.promote_types(t.dtype, torch.float32)
        best, gap = _nearest(x.to(working), op.output[rows].to(working), t.to(working), branches, x.dtype)
        value[rows] = best
        outside += int(gap.gt_(0).sum(dtype=torch.float64))
        found = value[rows]
        residual[rows] = relative(op(found) - t, t)
        distance[rows] = row_norms(found - x)
    reached = bool((residual <= torch.finfo(target.dtype).eps ** 0.5).all())
    status = Status.NEAREST if len(branches) > 1 else Status.EXACT
    certificate = Certificate(
        status=Status.PROJECTED if outside else status if reached else Status.LEAST_SQUARES,
        residual=residual,
        distance=distance,
        failed=torch.isnan(residual),
        projected=outside,
    )
    return Inverse(value, certificate)


def _blocks(op: Op) -> list[slice]:
    """Samples by blocks; all at once where parameters are the samples' own."""
    anchor = op.anchor
    own = any(p.dim() == anchor.dim() and len(p) > 1 for p in op.parameters.values())
    step = len(anchor) if own else max(1, BLOCK * len(anchor) // max(1, anchor.numel()))
    return [slice(i, i + step) for i in range(0, len(anchor), max(1, step))] if anchor.numel() else []


def _nearest(
    anchor: Tensor, output: Tensor, target: Tensor, branches: tuple[Branch, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The best candidate, entry by entry, and how far from the target the function stays there."""
    found, errors = [], [(output - target).abs_()]
    for branch in branches:
        x, y = branch.candidate(target, anchor, dtype)
        found.append(x)
        errors.append((y - target).abs_())
    gap = functools.reduce(torch.minimum, errors)
    # one number orders the candidates: what comes closest to the target has only its distance from the anchor
    best, score = anchor, (errors[0] - gap).mul_(FIRST)
    bound = torch.finfo(anchor.dtype).max / 4
    for x, error in zip(found, errors[1:], strict=True):
        own = (x - anchor).abs_().add_(error.sub_(gap), alpha=FIRST)
        # a choice by weights 0 and 1, which is exact between finite numbers and several times as fast as one by masks
        weight = torch.lt(own, score, out=torch.empty_like(own))
        best = torch.lerp(best, x.clamp(-bound, bound), weight)
        score = torch.minimum(score, own)
    return best, gap
