"""‖f(x) − t‖ → min, by conjugate gradients on points: one evaluation of f and one gradient a step.

Let r̄ be the residual at the point x̄, and D the last changes of it, which changed the residual by E. A step along the
gradient, s = β Jᵀ r̄, is evaluated, and tells what it changes: y = r(x̄ + s) − r̄. The next point is the best one,

    x̄ ← x̄ + s − [s D] γ,   γ = argmin ‖r(x̄ + s) − [y E] γ‖,

the locally optimal form of conjugate gradients (Knyazev, SIAM J. Sci. Comput. 23, 2001). For an affine f these are the
points of CGLS (Björck 1996, §7.4), whatever D holds beside the last change, so that the correction has no part in the
null space of J; another f is seen as it is at every step, where a pair of products with a Jacobian costs several of them.
β is the inverse of a ‖Δr‖² / ‖Δx‖², the largest that has helped (Barzilai & Borwein, IMA J. Numer. Anal. 8, 1988).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.directions import Directions
from fxinvert.linalg.jacobian import Jacobian
from fxinvert.linalg.track import Track, chosen
from fxinvert.linalg.vectors import dot, norm, per_sample

#: steps at most, and the last ones, whose rate tells whether a sample would arrive within them; not where there are so
#: few values that conjugate gradients end by themselves
STEPS, RATE = 40, 4
#: what is worth no more steps goes on while its error falls by this factor within so many
WORTHWHILE, SHORT = 0.5, 3
#: where no input reaches the target, the error falls to that of the closest
LEAST, SOME = 0.97, 3
#: changes that are kept, s among them, and entries of them per sample: more of them tell little more of large maps
WINDOW, ENTRIES = 20, 2**15


def descent(
    function: Callable[[Tensor], Tensor],
    point: Tensor,
    target: Tensor,
    track: Track,
    *,
    enough: Tensor,
    closest: bool,
    stretch: Tensor,
) -> Tensor:
    """Goes on with what is not done; tells the track every step, and the largest ‖Δr‖² / ‖Δx‖² at the end.

    Args:
        function: f, `(B, …)` → `(B, …)`, samples independent.
        point: where to start.
        target: t.
        track: of the samples.
        enough: `(B,)`, ‖t − f(x)‖ that is worth no more steps, unless these are fast.
        closest: go on to the input that comes closest to a target which none reaches.
        stretch: `(B,)`, the largest ‖Δr‖² / ‖Δx‖² that is known; 0 for none.
    """
    try:
        jacobian = Jacobian(function, point)
    except SolveError:  # there is no gradient
        return stretch
    residual = target - jacobian.output
    directions = Directions(point, residual, WINDOW, ENTRIES)
    for taken in range(STEPS):
        pulled = jacobian.adjoint(residual)
        if bool(((stretch == 0) & ~track.done).any()):
            told = norm(jacobian.apply(pulled)).square() / dot(pulled, pulled)
            stretch = torch.where(stretch == 0, told.nan_to_num(0, 0, 0), stretch)
        step = per_sample(torch.where(stretch > 0, 1 / stretch, 0), pulled) * pulled
        x = chosen(track.done, track.best, point + step)
        del jacobian  # before the next: what it holds is used again
        jacobian = Jacobian(function, x)
        reached = target - jacobian.output
        last = track.least
        track.take(x, reached, ~track.done)
        track.done |= _given_up(track, enough, closest, taken + 1, target[:1].numel())
        if bool(track.done.all()):
            break
        changed = reached - residual
        told = (norm(changed) / norm(step)).square().nan_to_num(0, 0, 0)
        stretch = torch.where(track.least < last, torch.maximum(stretch, told), stretch)
        directions.add(step, changed)
        back, missing = directions.combined(reached)
        directions.replace(step - back, missing - residual)
        point, residual = x - back, missing
    return stretch


def _given_up(track: Track, enough: Tensor, closest: bool, taken: int, size: int) -> Tensor:
    """`(B,)`, the samples for which another step is not worth it."""
    if closest:
        return track.fell(SOME) > LEAST
    values = min(track.best[:1].numel(), size)
    if taken < RATE + (values if values < STEPS else 0):
        return torch.zeros_like(track.done)
    near = (track.least <= enough) & (track.fell(SHORT) > WORTHWHILE)
    needed = RATE * (track.least / enough).log() / -track.fell(RATE).log()
    return near | (needed > STEPS - taken)
