"""Continuation: what sticks at kinks gets there on the model with its kinks rounded off, narrower and narrower.

A step that is right on the near side of a ReLU's kink is wrong beyond it, and a dead one tells no direction at all. On the
model with its kinks rounded off (`rest.py`) the way is smooth. Samples start from their anchors, with kinks as wide as the
model bears without being another one, and go on for as long as that brings something: the valleys are narrow and bent,
where damped steps are short. Then the kinks become narrower, so that the way ends at a value of the model itself
(smoothing continuation: Chen & Mangasarian 1996). Which width is best to begin with differs from sample to sample: those
that miss start again with others.

A model without kinks is what it is at any width: there it is more of the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fxinvert.inversion.rest import Rest
from fxinvert.inversion.stepping import TOLERANCE, improve
from fxinvert.linalg.vectors import by_sample
from fxinvert.rules.certificate import relative

#: how wide kinks are at most, how wide at the end, and by which factor they become narrower
WIDE, NARROW, NARROWER = 0.3, 1e-4, 0.6
#: at first they are as wide as makes the anchor's error no more than so many times what it is; one after the other, but of
#: outputs of more numbers than this, whose steps are dear, the first only
FIRST = (2.0, 1.2, 4.0)
LARGE = 64
#: steps of a turn, and the part of the error that it may leave for another of the same width to follow; none does in the
#: second half of the steps, so that there are some for all widths
TURN, LEFT = 8, 0.9
#: the caution that steps at a new width begin with, what a step that is refused adds and what one that is taken removes
CAUTION, MORE, LESS = 2.0, 0.5, 0.7

#: the rest of the model for some samples, `(k,)`
RestOf = Callable[[Tensor], Rest]


def continued(
    rest_of: RestOf, rows: Tensor, found: Tensor, anchor: Tensor, goal: Tensor, steps: int
) -> Tensor:
    """The best of what was found for some samples, and of the values on the ways from wide kinks to narrow ones.

    Args:
        rest_of: the rest of the model.
        rows: `(k,)`, the samples.
        found: `(k, …)`.
        anchor: `(k, …)`, where the ways begin.
        goal: `(k, …)`, what the rest of the model should give.
        steps: on a way, at most.
    """
    best, left = found.clone(), torch.arange(len(rows), device=rows.device)
    ways = FIRST if goal[:1].numel() <= LARGE else FIRST[:1]
    for first in ways if len(rows) else ():
        rest = rest_of(rows[left])
        best[left] = _way(rest_of, rows[left], best[left], anchor[left], goal[left], first, steps)
        left = left[_missed(rest, best[left], goal[left]) > TOLERANCE]
        if not len(left) or not rest.has_kinks:
            break
    return best


def _way(
    rest_of: RestOf, rows: Tensor, found: Tensor, start: Tensor, goal: Tensor, first: float, steps: int
) -> Tensor:
    """One way, for all samples at once; those that have arrived leave the others between two turns."""
    best, here = found.clone(), torch.arange(len(rows), device=rows.device)
    rest, value = rest_of(rows), start
    least = _missed(rest, found, goal)
    widths, error = _first_widths(rest, value, goal, first)
    caution, age, mark = torch.full_like(error, CAUTION), torch.zeros_like(error), error
    for step in range(steps):
        active = (least > TOLERANCE) & (widths > NARROW)
        if step % TURN == 0 and not bool(active.all()):
            some = active.nonzero()[:, 0]
            if not len(some):
                break
            here, value, goal, least = here[some], value[some], goal[some], least[some]
            widths, error, caution = widths[some], error[some], caution[some]
            age, mark, active = age[some], mark[some], active[some]
            rest = rest_of(rows[here])
        soft = partial(rest, widths=widths)
        value, error, caution, improved = improve(soft, value, goal, error, caution, active, MORE, LESS)
        hard = _missed(rest, value, goal)
        better = active & (hard < least)
        best[here] = torch.where(by_sample(better, value), value, best[here])
        least = torch.where(better, hard, least)
        age = age + 1
        turned = age >= TURN
        slow = (error > LEFT * mark) | (step >= steps // 2)
        through = (error <= TOLERANCE) | ~improved | (turned & slow)
        widths = torch.where(through, NARROWER * widths, widths)
        error = torch.where(through, _missed(rest, value, goal, widths), error)
        caution = torch.where(through, CAUTION, caution)
        age, mark = torch.where(through | turned, 0, age), torch.where(through | turned, error, mark)
    return best


def _first_widths(rest: Rest, value: Tensor, goal: Tensor, first: float) -> tuple[Tensor, Tensor]:
    """The widths to begin with, and the errors with kinks so wide."""
    hard = _missed(rest, value, goal)
    widths = torch.full_like(hard, WIDE)
    while True:
        error = _missed(rest, value, goal, widths)
        wide = (error > first * hard) & (widths > NARROW)
        if not bool(wide.any()):
            return widths, error
        widths = torch.where(wide, NARROWER * widths, widths)


def _missed(rest: Rest, value: Tensor, goal: Tensor, widths: Tensor | None = None) -> Tensor:
    return relative(rest(value, widths) - goal, goal)
