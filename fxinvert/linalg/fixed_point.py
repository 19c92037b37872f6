"""f(x) = t, by values of f as far as these lead, and by gradients from there.

x ← x + r with the residual r = t − f(x) suits f(x) = x + F(x) with a small F. Anderson's acceleration takes, among the
combinations of the last points, the one whose residual is least (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 49,
2011), and goes on from there: with ΔX, ΔR the last differences of points and of residuals,

    x ← x − ΔX γ + r − ΔR γ,   γ = argmin ‖r − ΔR γ‖.

For an affine f these are the points of GMRES, so that it may converge where F is no contraction, too. It costs one
evaluation of f a step. A sample for which a step leaves most of ‖r − ΔR γ‖ is slow: its f is far from the identity, and
it goes on by conjugate gradients (`descent.py`), as all do whose input and output have not one shape. Every sample has
its own points, its own γ and its own end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg.descent import descent
from fxinvert.linalg.directions import Directions
from fxinvert.linalg.track import Track, chosen
from fxinvert.linalg.vectors import norm

#: differences that are kept, entries of them per sample at most, and steps at most
WINDOW, ENTRIES, STEPS = 20, 2**20, 60
#: a sample is slow where a step leaves more than this part of the residual
SLOW = 0.6
#: part of the error at the anchor from which on a slow sample goes on from where it is
GAINED = 0.1


@dataclass(frozen=True)
class FixedPoint:
    """What the iteration has found, sample by sample.

    Attributes:
        value: `(B, …)`, the point of the least error.
        error: `(B,)`, ‖t − f(x)‖ there.
        evaluations: `(B,)`, of f, while the sample was not done.
        stretch: `(B,)`, the largest ‖Δr‖² / ‖Δx‖² that was seen; 0 for none.
    """

    value: Tensor
    error: Tensor
    evaluations: Tensor
    stretch: Tensor


def fixed_point(
    function: Callable[[Tensor], Tensor],
    anchor: Tensor,
    output: Tensor,
    target: Tensor,
    goal: Tensor,
    *,
    enough: Tensor | None = None,
    closest: bool = False,
    stretch: Tensor | None = None,
) -> FixedPoint:
    """An input whose output is the target up to `goal`, where the iteration finds one; samples by themselves.

    Args:
        function: f, `(B, …)` → `(B, …)`, samples independent.
        anchor: where to start.
        output: f of the anchor.
        target: t.
        goal: `(B,)`, ‖t − f(x)‖ at which a sample is done; one that is done at the start is not moved.
        enough: `(B,)`, ‖t − f(x)‖ that is worth no more steps, unless these are fast; by default `goal`.
        closest: go on to the input that comes closest to a target which none reaches, by gradients alone.
        stretch: `(B,)`, what an earlier search from the same anchor has seen.
    """
    track = Track(anchor, target - output, goal)
    stretch = torch.zeros_like(goal) if stretch is None else stretch
    if anchor.shape == target.shape and not closest:
        stretch = _by_values(function, target - output, target, track)
    if not bool(track.done.all()):
        enough = goal if enough is None else enough
        # where little was gained, the anchor leads to the nearest of many inputs, if there are many
        start = chosen(track.least < GAINED * norm(target - output), track.best, anchor)
        stretch = descent(function, start, target, track, enough=enough, closest=closest, stretch=stretch)
    return FixedPoint(track.best, track.least, track.evaluations, stretch)


def _by_values(
    function: Callable[[Tensor], Tensor], residual: Tensor, target: Tensor, track: Track
) -> Tensor:
    """Accelerated steps of the samples of a track until these are done or slow; ‖Δr‖² / ‖Δx‖² of the first."""
    x, slow, combined = track.best, torch.zeros_like(track.done), norm(residual)
    directions = Directions(x, residual, WINDOW, ENTRIES)
    stretch, step = torch.zeros_like(combined), residual
    for taken in range(STEPS):
        active = ~track.done & ~slow
        if not bool(active.any()):
            break
        moved = chosen(active, step, torch.zeros_like(x))
        x = x + moved
        before, residual = residual, target - function(x)
        track.take(x, residual, active)
        directions.add(moved, residual - before)
        back, missing = directions.combined(residual)
        step = missing - back
        last, combined = combined, norm(missing)
        slow = slow | (combined > SLOW * last)
        if not taken:  # later ones may be far from the anchor
            stretch = (norm(residual - before) / norm(moved)).square().nan_to_num(0, 0, 0)
    return stretch
