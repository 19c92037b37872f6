"""One mechanism for every scalar function: its monotone branches.

A scalar function is described by the intervals on which it is monotone or constant. The nearest pre-image of a target
is then found without any code of the function's own: take each branch's best candidate (the target, moved into the
branch's image, and inverted there; on a constant branch the anchor, moved into the branch's domain) and the anchor
itself, and keep the candidate that comes closest to the target and, among those that come equally close, the one
closest to the anchor:

    x* = argmin_x |f(x) − t|, ties by |x − x0|,

which is the anchored equation with λ → 0 for a function of one variable. `choice.py` does the choosing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType

import numpy as np
import torch
from torch import Tensor

from fxinvert.linalg.memory import waits

Scalar = Callable[..., Tensor]
Number = float | Tensor

#: How near an answer may come to an end of an image that is only reached at infinity, relative to the image's width
#: (absolute where the image is unbounded). It applies to targets beyond that end: they have no pre-image at all.
MARGIN = 1e-6
#: threads of torch that are no faster than numpy's one
FEW = 2
#: the part of all entries that may be written one by one
SPARSE = 1 / 64


@dataclass(frozen=True, eq=False)  # known by identity
class Branch:
    """An interval on which a scalar function is monotone or constant; ends are numbers, or tensors that broadcast.

    Attributes:
        low, high: ends of the interval of x.
        least, most: ends of its image, the smaller first.
        inverse: the pre-image nearest the anchor, of a value of the image and the anchor; see `writing`.
        open_least, open_most: whether that end of the image is only approached, at infinity. It is never returned.
        open_low, open_high: whether that end of the interval does not belong to it: a pole or a jump.
        rises: whether the function increases; None where it does neither, or both.
        rounded: whether the op computes the constant of a constant branch with rounding.
        plain: whether the function is y = x on it.
        keeps: whether the inverse of a value of the image lies in the interval, and is finite, whatever rounding does.
        costly: whether the inverse takes so long that it pays to look first which entries need it.
    """

    low: Number
    high: Number
    least: Number
    most: Number
    inverse: Callable[..., Tensor]
    open_least: bool = False
    open_most: bool = False
    open_low: bool = False
    open_high: bool = False
    rises: bool | None = None
    rounded: bool = False
    plain: bool = False
    keeps: bool = False
    costly: bool = False

    @property
    def flat(self) -> bool:
        """Whether the function is constant on it."""
        return self.rises is None and self.least is self.most

    @property
    def endless(self) -> bool:
        """Whether it leads from every number to every number, and so to infinity at infinity only."""
        ends = (-math.inf, math.inf)
        return self.numeric and (self.low, self.high) == ends and (self.least, self.most) == ends

    @functools.cached_property
    def numeric(self) -> bool:
        """Whether all ends are numbers."""
        return not any(isinstance(end, Tensor) for end in (self.low, self.high, self.least, self.most))

    def last(self, dtype: torch.dtype) -> tuple[Number, Number]:
        """The least and the largest value that are returned: an open end is missed by a margin that `dtype` can tell."""
        if isinstance(self.least, Tensor) or isinstance(self.most, Tensor):
            return self.least + self.open_least * MARGIN, self.most - self.open_most * MARGIN
        width, eps = self.most - self.least, torch.finfo(dtype).eps
        margin = MARGIN * (width if math.isfinite(width) else 1.0)
        least, most = (
            max(margin, abs(end) * eps) if math.isfinite(end) else 0.0 for end in (self.least, self.most)
        )
        return self.least + self.open_least * least, self.most - self.open_most * most

    def beyond(self, target: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where a target lies at an end that is only approached, or beyond it (`holds`): below, above; None for none.

        Where looking at the targets would wait for a device there may be a tensor of nothing but no in the place of none.
        """
        below = above = None
        if self.open_least and (waits(target) or not bool((target.amin() > self.least).all())):
            below = holds(torch.le, target, self.least)
        if self.open_most and (waits(target) or not bool((target.amax() < self.most).all())):
            above = holds(torch.ge, target, self.most)
        return below, above

    def value(self, target: Tensor, beyond: tuple[Tensor | None, Tensor | None] | None = None) -> Tensor:
        """The value nearest to the target that is returned on this branch; `beyond` if it is known."""
        below, above = beyond or self.beyond(target)
        least = -math.inf if self.open_least and below is None else self.least
        most = math.inf if self.open_most and above is None else self.most
        value = within(target, least, most)
        for replaced, last in zip((below, above), self.last(value.dtype), strict=True):
            if replaced is not None:
                last = last.to(value) if isinstance(last, Tensor) else value.new_full((), last)
                value = chosen(value, last, replaced)
        return value

    def within(self, dtype: torch.dtype) -> tuple[Number, Number]:
        """The ends of the interval that belong to it."""
        low = _off(self.low, 1, dtype) if self.open_low else self.low
        return low, _off(self.high, -1, dtype) if self.open_high else self.high

    def input(
        self,
        value: Tensor,
        anchor: Tensor,
        dtype: torch.dtype,
        bounded: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:
        """The pre-image of a value of the image, for an answer in `dtype`; finite unless `bounded` is False.

        It may be written to `out`.
        """
        out = out if getattr(self.inverse, "writes", False) else None
        found = self.inverse(value, anchor) if out is None else self.inverse(value, anchor, out)
        if self.keeps and not (self.open_low or self.open_high):
            return found
        low, high = self.within(dtype)
        if found is anchor or not bounded or isinstance(low, Tensor) or isinstance(high, Tensor):
            return within(found, low, high, out)
        bound = torch.finfo(dtype).max
        return torch.clamp(found, max(low, -bound), min(high, bound), out=out)


def holds(compare: Callable[..., Tensor], one: Tensor, other: Number, out: Tensor | None = None) -> Tensor:
    """Where a comparison holds: 1, else 0, may be written to `out`; a mask on a device and in a kernel.

    On the processor a choice by such weights is several times as fast as one by masks.
    """
    if waits(one):
        return compare(one, other)
    return compare(one, other, out=torch.empty_like(one) if out is None else out)


def common(one: Tensor, other: Tensor) -> Tensor | None:
    """The places where two tensors are the same, row by row, if they are few; None if not, or where looking waits."""
    if waits(one):
        return None
    # numpy compares in a third of the time; where many entries are the same, a few tell
    first, second = one.detach().numpy(), other.detach().numpy()
    for part in (slice(0, 1024 if one.dim() == 1 else 1), slice(None)):
        same = np.equal(first[part], second[part])
        count = np.count_nonzero(same)
        if count > SPARSE * same.size:
            return None
    return torch.from_numpy(np.flatnonzero(same) if count else np.empty(0, np.int64))


def log(y: Tensor) -> Tensor:
    """The logarithm, in single precision to four units in the last place where torch has few threads: by numpy.

    That takes a third of the time that torch takes with one thread.
    """
    if waits(y) or y.dtype != torch.float32 or torch.get_num_threads() > FEW:
        return y.log()
    found = torch.empty_like(y)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.log(y.detach().numpy(), out=found.numpy())
    return found


def chosen(one: Tensor, other: Tensor, where: Tensor, out: Tensor | None = None) -> Tensor:
    """The other `where` something holds, exactly between finite numbers. `out` may be written to."""
    if where.dtype == torch.bool:
        return torch.where(where, other, one)
    return torch.lerp(one, other, where, out=out)


def same(y: Tensor) -> Tensor:
    """The inverse of y = x."""
    return y


def flat(low: Number, high: Number, value: Number, *, rounded: bool = False) -> Branch:
    """The function is constant on [low, high]; `rounded` tells that the op computes the constant with rounding."""
    return Branch(low, high, value, value, lambda y, anchor: anchor, rounded=rounded)


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


def writing(inverse: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Marks an inverse that may be told by a third argument, `out`, where to write."""
    inverse.writes = True  # type: ignore[attr-defined]
    return inverse


def _monotone(
    low: Number, high: Number, image: tuple[Number, Number], inverse: Scalar, *, increasing: bool
) -> Branch:
    at_low, at_high = image if increasing else image[::-1]
    # torch's own functions can write anywhere, with or without arguments filled in
    own = inverse.func if isinstance(inverse, functools.partial) else inverse
    anywhere = isinstance(own, BuiltinFunctionType) or getattr(own, "writes", False)

    def nearest(y: Tensor, anchor: Tensor, out: Tensor | None = None) -> Tensor:
        return inverse(y, out=out) if anywhere else inverse(y)

    nearest.writes = anywhere  # type: ignore[attr-defined]
    # an end of the image at infinity needs no margin: no target lies beyond it
    approached = _infinite(low) and not _infinite(at_low), _infinite(high) and not _infinite(at_high)
    return Branch(
        low,
        high,
        *image,
        nearest,
        *(approached if increasing else approached[::-1]),
        open_low=_infinite(at_low) and not _infinite(low),
        open_high=_infinite(at_high) and not _infinite(high),
        rises=increasing,
        plain=inverse is same,
        keeps=inverse is same,
    )


def _infinite(end: Number) -> bool:
    return not isinstance(end, Tensor) and math.isinf(end)


def _off(end: Number, direction: int, dtype: torch.dtype) -> Number:
    """The number next to an end that does not belong to the interval."""
    digits = torch.finfo(dtype)
    size = end.abs() if isinstance(end, Tensor) else abs(end)
    return end + direction * (size * digits.eps + digits.tiny)


class Spare:
    """Memory for what is found on the way to an answer, the same for all blocks, of which the first is the largest.

    There is none on a device, whose allocator keeps what it is given back, and while a kernel is traced.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def __call__(self, place: int, like: Tensor) -> Tensor | None:
        """What is held in a place, of a tensor's shape; its values are whatever they are."""
        if waits(like):
            return None
        held = self._held.get(place)
        if held is None:
            held = self._held[place] = torch.empty_like(like)
        return held if held.shape == like.shape else held[: len(like)]


def within(value: Tensor, low: Number, high: Number, out: Tensor | None = None) -> Tensor:
    """`value` moved into [low, high], whose ends are numbers or tensors; itself where neither is finite.

    Else it may be written to `out`.
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        ends = (torch.as_tensor(end, dtype=value.dtype, device=value.device) for end in (low, high))
        return torch.clamp(value, *ends, out=out)
    least, most = (None if math.isinf(end) else end for end in (low, high))
    return value if least is None and most is None else torch.clamp(value, least, most, out=out)
