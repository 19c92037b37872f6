"""The choice among the branches of a scalar function: the nearest pre-image, entry by entry.

Most functions need little. A constant branch that continues a monotone one needs no candidate of its own: where
the output is the target already the anchor stays, and elsewhere the branch's nearest point is its end, which is the
monotone branch's pre-image of that value. If one monotone branch is left, the target alone decides; if two, of which one
reaches every value that the other does, the middle between their pre-images does. Only other functions have
all their candidates compared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fxinvert.linalg.memory import waits
from fxinvert.rules.branches import Branch, Number, Spare, chosen, common, holds, within
from fxinvert.rules.pieces import Clipped, Stepped

#: makes any difference in the distance from the target count for more than the distance from the anchor
FIRST = 1e30
#: values between which the middle between two branches is bounded
CELLS = 1024

#: (anchor, target, output, dtype of the answer, where to write it, whether it may not overflow, other memory) -> the answer
Choice = Callable[[Tensor, Tensor, Tensor, torch.dtype, Tensor, bool, Spare], Tensor]


def choice(branches: tuple[Branch, ...]) -> Choice:
    """The least work that finds the nearest pre-image."""
    return (_known if all(b.numeric for b in branches) else _chosen)(branches)


@functools.lru_cache(maxsize=128)
def _known(branches: tuple[Branch, ...]) -> Choice:
    return _chosen(branches)


def _chosen(branches: tuple[Branch, ...]) -> Choice:
    needed = [b for b in branches if not (b.flat and _continues(b, branches))]
    for main in needed:
        others = [b for b in needed if b is not main]
        ends = _ends(main, branches)
        if ends is None or len(others) > 1 or any(b.rises is None for b in needed):
            continue
        if not others or all(_covers(main, b) for b in branches):
            # it is asked for no values below those of the main branch
            lower = [_is(b.least, main.least) and not b.open_least for b in others]
            others = [replace(b, least=-math.inf) if low else b for b, low in zip(others, lower, strict=True)]
            return Clipped.of(main, *ends, *others) or _Direct(main, *ends, *others)
    return Stepped.of(needed) or functools.partial(_compared, branches)


def _continues(constant: Branch, branches: Sequence[Branch]) -> bool:
    """Whether a monotone branch takes the constant's value, exactly, at each of its ends."""

    def met(end: Number, *, above: bool) -> bool:
        if not isinstance(end, Tensor) and math.isinf(end):
            return True
        for other in branches:
            own, opened = (other.low, other.open_low) if above else (other.high, other.open_high)
            value = other.least if other.rises is above else other.most
            if other.rises is not None and not opened and _is(own, end) and _is(value, constant.least):
                return True
        return False

    return not constant.rounded and met(constant.low, above=False) and met(constant.high, above=True)


def _ends(main: Branch, branches: Sequence[Branch]) -> tuple[Number, Number] | None:
    """The ends of the image that a constant branch holds, infinite where none does; None where that is not known."""
    held = [b.least for b in branches if b.flat]
    floor = main.least if any(_is(main.least, value) for value in held) else -math.inf
    ceiling = main.most if any(_is(main.most, value) for value in held) else math.inf
    for end, own in ((floor, main.least), (ceiling, main.most)):
        if isinstance(own, Tensor) and not isinstance(end, Tensor):
            return None
    return floor, ceiling


def _covers(main: Branch, other: Branch) -> bool:
    """Whether the one reaches all that the other does, and lies beside it."""
    ends = (main.low, main.high, main.least, main.most, other.low, other.high, other.least, other.most)
    if any(isinstance(end, Tensor) for end in ends):
        return False
    inside = main.least <= other.least and other.most <= main.most
    beside = other is main or other.high <= main.low or main.high <= other.low
    return bool(inside and beside)


def _is(one: Number, other: Number) -> bool:
    """Whether two ends are one number, or the same tensor."""
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)


def _at(out: Tensor, found: Tensor) -> Tensor:
    """What was found, where it is to be written."""
    return found if found is out else out.copy_(found)


@dataclass(frozen=True)
class _Direct:
    """The nearest pre-image where one branch reaches every value, and at most one other lies beside it.

    Attributes:
        main: reaches every value.
        floor, ceiling: ends of its image that a constant branch holds, infinite where none does.
        other: the other branch.
    """

    main: Branch
    floor: Number
    ceiling: Number
    other: Branch | None = None

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, dtype: torch.dtype, out: Tensor, bounded: bool, spare: Spare
    ) -> Tensor:
        main = self.main
        wanted, value = self._attainable(t, y, spare)
        stay = common(wanted, y)
        found = main.input(value, x, dtype, bounded, out)
        if self.other is not None:
            if waits(x) or self.border is None:
                found = self._nearer(self.other, found, value, x, dtype, bounded)
            else:
                found = self._nearer_of_few(self.other, _at(out, found), value, x, dtype, bounded)
        if stay is not None:
            found = _at(out, found)
            return found.put_(stay, x.take(stay)) if len(stay) else found
        return chosen(x, found, holds(torch.ne, wanted, y, spare(1, x) if found is out else out), out)

    def _attainable(self, t: Tensor, y: Tensor, spare: Spare) -> tuple[Tensor, Tensor]:
        """What is wanted, an entry staying at its anchor where that is the output; and the value to invert.

        A target beyond an end that is only approached becomes the last value that is returned; or the output, if
        rounding has brought that even nearer to the end, which keeps the anchor.
        """
        main = self.main
        wanted = within(t, self.floor, self.ceiling, spare(0, t))
        if _is(main.least, self.floor) and _is(main.most, self.ceiling):
            return wanted, wanted
        below, above = main.beyond(t)
        value = main.value(wanted, (below, above))
        lowest, highest = main.last(t.dtype)
        if below is not None:
            wanted = chosen(wanted, y.clamp(max=lowest), below)
        if above is not None:
            wanted = chosen(wanted, y.clamp(min=highest), above)
        return wanted, value

    def _nearer(
        self, other: Branch, found: Tensor, value: Tensor, x: Tensor, dtype: torch.dtype, bounded: bool
    ) -> Tensor:
        """The main branch's pre-image, or the other's where that is nearer."""
        main = self.main
        second = other.input(other.value(value), x, dtype, bounded)
        middle = torch.lerp(found, second, 0.5)
        nearer = holds(torch.gt if other.high <= main.low else torch.lt, middle, x)
        if other.most < main.most:
            nearer.mul_(holds(torch.lt if other.open_most else torch.le, value, other.most, middle))
        if other.least > main.least:
            nearer.mul_(holds(torch.gt if other.open_least else torch.ge, value, other.least, middle))
        return chosen(found, second, nearer)

    def _nearer_of_few(
        self, other: Branch, found: Tensor, value: Tensor, x: Tensor, dtype: torch.dtype, bounded: bool
    ) -> Tensor:
        """The same, written over what was found, where few anchors lie on the other branch's side of the border."""
        assert self.border is not None
        beyond = np.less if other.high <= self.main.low else np.greater
        few = beyond(x.detach().numpy(), self.border) & np.less_equal(value.detach().numpy(), other.most)
        rows = torch.from_numpy(np.flatnonzero(few))
        if not len(rows):
            return found
        own, asked, near = (v.reshape(-1).index_select(0, rows) for v in (found, value, x))
        return found.put_(rows, self._nearer(other, own, asked, near, dtype, bounded))

    @functools.cached_property
    def border(self) -> float | None:
        """An anchor's place beyond which the other branch's pre-images may be nearer; None if that need not be known.

        Both pre-images are monotone in the value: between two values the middle lies within those of their ends.
        """
        main, other = self.main, self.other
        if other is None or not other.costly:
            return None
        least, most = float(max(main.least, other.least)), float(min(main.most, other.most))
        values = torch.linspace(least, most, CELLS + 1, dtype=torch.float64).clamp_(least, most)
        below = other.high <= main.low
        end = torch.maximum if below else torch.minimum
        one, two = (end(x[1:], x[:-1]) for x in (b.inverse(values, values) for b in (main, other)))
        middles = (one + two) / 2
        border = float(middles.amax() if below else middles.amin())
        return border if math.isfinite(border) else None


def _compared(
    branches: tuple[Branch, ...],
    x: Tensor,
    t: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    out: Tensor,
    bounded: bool,
    spare: Spare,
) -> Tensor:
    """The best of all candidates, the anchor first: an entry moves only if that brings the output closer."""
    errors, found = [(y - t).abs_()], []
    for branch in branches:
        value = branch.value(t)
        found.append(branch.input(value, x, dtype))
        errors.append((value - t).abs_())
    gap = functools.reduce(torch.minimum, errors)
    # one number orders the candidates: what comes closest to the target has only its distance from the anchor
    best, score = x, (errors[0] - gap).mul_(FIRST)
    for candidate, error in zip(found, errors[1:], strict=True):
        own = (candidate - x).abs_().add_(error.sub_(gap), alpha=FIRST)
        best = chosen(best, candidate, holds(torch.lt, own, score, out))
        score = torch.minimum(score, own)
    return best
