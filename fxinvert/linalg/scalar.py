"""f(x) = t value by value, for a function that acts on every value by itself and of which only its values are known.

With the error e = f − t, all values are worked on at once, an evaluation of f for each step:

1. From the anchor a, e is looked at on both sides, at distances that grow by `GROWTH` from `FIRST` to `LAST` times
   max(|a|, 1). Where its sign changes, a root lies.
2. Before that, or where it does not, e may cross zero twice between two looks, or come closest there: golden sections find the
   least of |e| about the first look from where a parabola reaches zero, or else about the least that was seen (Kiefer, Proc. AMS
   4, 1953). An e that falls as far as one looks has its
   closest at infinity, and x is bounded: it ends where all but `LITTLE` of what can be gained is gained.
3. Roots are closed in by secants, the end that stays being halved (Illinois: Dowell & Jarratt, BIT 11, 1971), and by bisection.

A nearer root is overlooked where two lie between two looks, and the looks around do not bend as a parabola would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

#: distances from the anchor that are looked at, in units of max(|a|, 1)
FIRST, LAST, GROWTH = 1e-3, 1e3, 1.25
#: the larger part of a golden section, and how many of them
GOLDEN, SECTIONS = (5**0.5 - 1) / 2, 40
#: steps that close in a root, at most; every so many of them is a bisection
STEPS, BISECT = 120, 3
#: of what can be gained, what is not worth going farther and farther away for
LITTLE = 1e-3


@dataclass(frozen=True)
class Roots:
    """What was found for every value.

    Attributes:
        value: x, of the anchor's shape.
        closest: whether x is a root, or f comes no closer around it.
        evaluations: of f.
    """

    value: Tensor
    closest: Tensor
    evaluations: int


def roots(function: Function, anchor: Tensor, output: Tensor, target: Tensor) -> Roots:
    """The nearest root of f − t, or the closest that f comes to t.

    Args:
        function: f, entry by entry; what is not finite is no value of it.
        anchor: a, of any shape.
        output: f(a); where it is t, the answer is the anchor.
        target: t, of the same shape.
    """
    evaluations = 0
    start = _finite(output - target)
    side = torch.where(start < 0, -1.0, 1.0).to(start.dtype)

    def error(x: Tensor) -> Tensor:
        """|e| as long as it keeps the sign that it has at the anchor, below zero beyond."""
        nonlocal evaluations
        evaluations += 1
        return _finite((function(x) - target) * side)

    start = start.abs()
    low, high = (_look(error, anchor, start, direction) for direction in (-1, 1))
    best = low.where(low.least < high.least, high)
    least, lowest = _least(error, best.before, best.after)
    better = lowest < best.least
    least, lowest = torch.where(better, least, best.at), torch.where(better, lowest, best.least)

    found = low.where((low.beyond - anchor).abs() < (high.beyond - anchor).abs(), high)
    seen = low.crossed | high.crossed
    crossed = seen | (lowest <= 0)
    nearer = (lowest <= 0) & ~(seen & ((found.beyond - anchor).abs() <= (least - anchor).abs()))
    endless = ~crossed & best.stays & (best.fall <= LITTLE * (start - lowest))
    # out of reach, the near end of where it is as close as can be
    level = torch.where(crossed, 0, lowest + torch.where(endless, LITTLE * (start - lowest), 0))
    here = nearer | ~crossed
    near = torch.where(here, torch.where(endless, anchor, best.before), found.near)
    beyond = torch.where(here, least, found.beyond)
    known = start.isfinite()
    moves = known & (start > 0)
    value = _closed(lambda x: error(x) - level, near, beyond, moves)
    return Roots(torch.where(moves, value, anchor), known & ~endless, evaluations)


@dataclass(frozen=True)
class _Look:
    """What is seen on one side of the anchor.

    Attributes:
        crossed: whether the error changes its sign.
        near, beyond: between which looks; infinitely far where it does not.
        least, at: the least error up to there, and where.
        before, after: the looks about that.
        fall: of the error from the look before.
        stays: whether it is no higher at the last look.
    """

    crossed: Tensor
    near: Tensor
    beyond: Tensor
    least: Tensor
    at: Tensor
    before: Tensor
    after: Tensor
    fall: Tensor
    stays: Tensor

    def where(self, here: Tensor, other: _Look) -> _Look:
        """Of two sides this one where `here` is true."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Look(*[torch.where(here, own, others) for own, others in pairs])


def _look(error: Function, anchor: Tensor, start: Tensor, direction: int) -> _Look:
    unit = anchor.abs().clamp(min=1) * direction
    crossed = torch.zeros_like(start, dtype=torch.bool)
    near, beyond = torch.full_like(anchor, torch.inf), torch.full_like(anchor, torch.inf)
    earlier, above, x, value = anchor, start, anchor, start
    least, at, before, after = start, anchor, anchor, anchor
    fresh, touched, fall, distance = ~crossed, crossed, start, FIRST
    while distance <= LAST and not bool(crossed.all()):
        further = anchor + distance * unit
        there = error(further)
        crosses = (there <= 0) & (value > 0) & ~crossed
        near, beyond = torch.where(crosses, x, near), torch.where(crosses, further, beyond)
        touches = _touches((earlier, x, further), (above, value, there)) & ~touched & ~crossed
        after = torch.where(touches | (fresh & ~touched & ~crossed), further, after)
        before = torch.where(touches, earlier, before)
        crossed, touched = crossed | crosses, touched | touches
        fresh = (there < least) & ~crossed & ~touched
        least, at = torch.where(fresh, there, least), torch.where(fresh, further, at)
        before, fall = torch.where(fresh, x, before), torch.where(fresh, value - there, fall)
        earlier, above, x, value, distance = x, value, further, there, distance * GROWTH
    return _Look(crossed, near, beyond, least, at, before, after, fall, value <= least)


def _touches(points: tuple[Tensor, ...], errors: tuple[Tensor, ...]) -> Tensor:
    """Whether the error, least at the middle one of three points, may reach zero: twice the depth of the parabola."""
    (first, middle, last), (before, least, after) = points, errors
    falls, rises = (least - before) / (middle - first), (after - least) / (last - middle)
    curvature = (rises - falls) / (last - first)
    slope = falls + curvature * (middle - first)
    return (least < before) & (least <= after) & (least <= slope.square() / (2 * curvature))


def _least(error: Function, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Where between two points the error is least, and how large it is, by golden sections."""
    left, right = last - GOLDEN * (last - first), first + GOLDEN * (last - first)
    at_left, at_right = error(left), error(right)
    for _ in range(SECTIONS):
        lower = at_left < at_right
        first, last = torch.where(lower, first, left), torch.where(lower, right, last)
        kept, at_kept = torch.where(lower, left, right), torch.where(lower, at_left, at_right)
        new = torch.where(lower, last - GOLDEN * (last - first), first + GOLDEN * (last - first))
        at_new = error(new)
        left, right = torch.where(lower, new, kept), torch.where(lower, kept, new)
        at_left, at_right = torch.where(lower, at_new, at_kept), torch.where(lower, at_kept, at_new)
    lower = at_left < at_right
    return torch.where(lower, left, right), torch.where(lower, at_left, at_right)


def _closed(error: Function, near: Tensor, beyond: Tensor, sought: Tensor) -> Tensor:
    """Where it is sought: the nearest point between two at which the error is no longer above zero."""
    above, below = error(near), error(beyond)
    kept = torch.zeros_like(near)
    for step in range(STEPS):
        secant = near + (beyond - near) * (above / (above - below))
        middle = near + (beyond - near) / 2
        inside = (secant - near) * (beyond - secant) > 0
        x = middle if step % BISECT == 0 else torch.where(inside, secant, middle)
        if not bool((sought & (x != near) & (x != beyond)).any()):
            break
        value = error(x)
        positive = value > 0
        # the end that stays twice counts half
        below = torch.where(positive & (kept > 0), below / 2, below)
        above = torch.where(~positive & (kept < 0), above / 2, above)
        kept = torch.where(positive, 1.0, -1.0).to(kept.dtype)
        near, above = torch.where(positive, x, near), torch.where(positive, value, above)
        beyond, below = torch.where(positive, beyond, x), torch.where(positive, below, value)
    return beyond


def _finite(error: Tensor) -> Tensor:
    """As large as can be where it is not finite."""
    return torch.where(error.isfinite(), error, torch.inf)
