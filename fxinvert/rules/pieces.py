"""The choice for functions that are y = x in pieces, with constants beside and between: ReLU, clipping, hard shrinking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg.memory import waits
from fxinvert.rules.branches import Branch, Number, Spare, chosen, holds, within


@dataclass(frozen=True)
class Clipped:
    """The nearest pre-image of y = x, clipped to [low, high]: the target, or at an end what of the anchor lies beyond it."""

    low: float
    high: float

    @classmethod
    def of(cls, main: Branch, floor: Number, ceiling: Number, *others: Branch) -> Clipped | None:
        """The choice among some branches, if they are y = x between constants that continue it."""
        if others or not (main.plain and main.numeric):
            return None
        low, high = float(main.least), float(main.most)
        return cls(low, high) if (low, high) == (floor, ceiling) and low < high else None

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, dtype: torch.dtype, out: Tensor, bounded: bool, spare: Spare
    ) -> Tensor:
        if _below(t, self.high):
            # the target if it is larger than the lower end, else the anchor, moved below that
            torch.clamp(x, max=self.low, out=out)
            return torch.maximum(out, torch.threshold(t, self.low, -math.inf, out=spare(0, t)), out=out)
        wanted = within(t, self.low, self.high, spare(0, t))
        if not waits(x):  # in the cache, where the output is not
            y = within(x, self.low, self.high, out)
        return chosen(x, wanted, holds(torch.ne, wanted, y, out), out)


@dataclass(frozen=True)
class Stepped:
    """The nearest pre-image of y = x with a step, a constant where the function jumps, between what lies below and above it.

    Attributes:
        step: the constant branch.
        sides: the branches beside it, on which y = x.
    """

    step: Branch
    sides: tuple[Branch, ...]

    @classmethod
    def of(cls, branches: Sequence[Branch]) -> Stepped | None:
        """The choice among some branches, if they are a step and its sides."""
        steps, sides = [b for b in branches if b.flat], tuple(b for b in branches if not b.flat)
        ends = [end for b in branches for end in (b.low, b.high, b.least, b.most)]
        if len(steps) != 1 or steps[0].rounded or any(isinstance(end, Tensor) for end in ends):
            return None
        (step,) = steps
        fits = all(
            side.plain
            and (
                (side.high <= step.low and side.most <= step.least)
                or (side.low >= step.high and side.least >= step.most)
            )
            for side in sides
        )
        return cls(step, sides) if fits else None

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, dtype: torch.dtype, out: Tensor, bounded: bool, spare: Spare
    ) -> Tensor:
        step = self.step
        found = torch.clamp(x, float(step.low), float(step.high), out=out)
        for side in self.sides:
            low, high = side.within(dtype)
            above = side.low >= step.high
            middle = (step.least + (low if above else high)) / 2
            nearer = holds(torch.gt if above else torch.lt, t, middle, spare(0, t))
            found = chosen(found, within(t, low, high, spare(1, t)), nearer, out)
        return found


def _below(target: Tensor, most: float) -> bool:
    """Whether all targets are below an end, if that is not infinite; False where looking waits for a device."""
    if most == math.inf or waits(target):
        return most == math.inf
    # where entries often are beyond, a few tell
    few = target[: 1024 if target.dim() == 1 else 1]
    return bool(few.amax() < most) and bool(target.amax() < most)
