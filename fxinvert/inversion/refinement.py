"""Refine: Gauss–Newton on the rest of the model, from the target that the node-by-node pass has found.

The node-by-node pass inverts one op at a time, so that the errors of unattainable targets add up on the way to the
input. Where the model, run forward from a node's target x, misses the outputs that are right by r(x) (`goal.py`), steps

    x ← x − Jᵀ(JJᵀ + μI)⁻¹ r(x)

follow, J the Jacobian of r at x, sample by sample. For μ → 0 that is J⁺, the smallest step that removes the linearized
error; the least μ is of the size of the rounding errors of JJᵀ. A step that does not lower the sample's error is tried
again with more damping (Levenberg 1944, Marquardt 1963), and one that does makes the next one bolder. A sample that
stagnates starts again, once, from its anchor, where the model is what it was trained to be; so does one whose target misses
by more than its anchor. Of all that was tried a sample keeps the best: an error never grows.

What sticks all the same goes around. A step that is right on the near side of a ReLU's kink is wrong beyond it, and a dead
one tells no direction at all; on the model with its kinks rounded off (`rest.py`) the way is smooth. So the same steps are
taken there, from the anchor on, with narrower and narrower kinks, and at last on the model itself (smoothing continuation:
Chen & Mangasarian 1996).

An output of at most some hundred numbers has a Jacobian of as many rows, found by one batched backward pass. Larger ones
are solved by conjugate gradients on products with J, and a step that is refused is halved.

The steps are as smooth as the model: where a unit lies on a kink, as ReLUs with target 0 do, rounding chooses its
side, so that a refined target may come out another, as good a one, in a batch of another size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fxinvert.inversion.goal import Miss
from fxinvert.inversion.stepping import TOLERANCE, Run, improve
from fxinvert.linalg.vectors import norm, per_sample

#: a sample whose error is more than this part of what it was before the step stagnates
SLOW = 0.9
#: how wide kinks are, one after the other (see `rest.py`)
WIDTHS = (0.3, 0.1, 0.03, 0.01)


def refine(miss: Miss, start: Tensor, anchor: Tensor, steps: int, hopeless: Tensor | None = None) -> Tensor:
    """A value whose output is nearer to what is right than that of the one it starts from, for every sample by itself.

    Args:
        miss: what the output misses, samples independent.
        start: `(B, …)`, the target found so far.
        anchor: `(B, …)`, where samples start for which it is better, and those that stagnate start again.
        steps: the largest number of steps per sample, and as many more for every width of the kinks.
        hopeless: which samples, `(B,)`, are known to miss whatever their value is: they do not go around.
    """
    with torch.no_grad():
        value, error = stepped(miss, start, anchor, steps, miss.of)
        missed = (error > TOLERANCE) & torch.isfinite(error)
        if not miss.rest.has_kinks or not bool(missed.any()):
            return value
        rows = (missed if hopeless is None else missed & ~hopeless).nonzero()[:, 0]
        if len(rows):
            value[rows] = _around(miss.of(rows), value[rows], anchor[rows], steps)
        return value


def _around(miss: Miss, found: Tensor, anchor: Tensor, steps: int) -> Tensor:
    """From the anchor through kinks that become narrower; the best of where that leads and of what was found."""

    def of(rows: Tensor, width: float) -> Run:
        return partial(miss.of(rows), width=width)

    value = anchor
    for width in WIDTHS:
        value, _ = stepped(partial(miss, width=width), value, value, steps, partial(of, width=width))
    value, _ = stepped(miss, value, found, steps, miss.of)
    return value


def stepped(
    miss: Run, start: Tensor, anchor: Tensor, steps: int, part: Callable[[Tensor], Run] | None = None
) -> tuple[Tensor, Tensor]:
    """The best values of plain Gauss–Newton, and their errors.

    Args:
        miss: what a value misses, `(B, …)` → `(B, n)`.
        start: `(B, …)`.
        anchor: `(B, …)`.
        steps: at most.
        part: `miss` for some samples, so that those that are done leave the others. None: they stay.
    """
    error, fallback = norm(miss(start)), norm(miss(anchor))
    fresh = fallback < error
    value, error = torch.where(per_sample(fresh, start), anchor, start), torch.where(fresh, fallback, error)
    best, least = value.clone(), error.clone()
    caution = torch.zeros_like(error)
    given_up = torch.zeros_like(fresh)
    here = torch.arange(len(error), device=error.device)
    for _ in range(steps):
        active = (least[here] > TOLERANCE) & ~given_up
        count = int(active.sum())
        if not count:
            break
        if part is not None and count <= len(here) / 2:
            some = active.nonzero()[:, 0]
            here, value, error, anchor = here[some], value[some], error[some], anchor[some]
            caution, fresh, fallback = caution[some], fresh[some], fallback[some]
            given_up, active, miss = given_up[some], active[some], part(here)
        before = error
        value, error, caution, improved = improve(miss, value, error, caution, active)
        better = error < least[here]
        best[here] = torch.where(per_sample(better, value), value, best[here])
        least[here] = torch.where(better, error, least[here])
        again = active & ~fresh & (error > SLOW * before) & (least[here] > TOLERANCE)
        given_up = given_up | (active & ~improved & ~again)
        fresh = fresh | again
        value = torch.where(per_sample(again, value), anchor, value)
        error = torch.where(again, fallback, error)
        caution = torch.where(again, 0, caution)
    return best, least
