"""Refine: Gauss–Newton on the rest of the model, from the target that the node-by-node pass has found.

The node-by-node pass inverts one op at a time, so that the errors of unattainable targets add up on the way to the
input. Where the model, run forward from a node's target x, misses the output target t, steps

    x ← x + Jᵀ(JJᵀ + μI)⁻¹ (t − f(x))

follow, f the model from that node on and J its Jacobian at x, sample by sample. For μ → 0 that is J⁺, the smallest
step that removes the linearized error; the least μ is of the size of the rounding errors of JJᵀ. A step that does not
lower the sample's error is tried again with more damping (Levenberg 1944, Marquardt 1963), and one that does makes
the next one bolder. A sample that stagnates starts again, once, from its anchor, where the model is what it was trained to
be; so does one whose target misses by more than its anchor. Of all that was tried a sample keeps the best: an error
never grows.

What sticks all the same goes on through kinks that are rounded off (`continuation.py`).

An output of at most some hundred numbers has a Jacobian of as many rows, found by one batched backward pass. Larger ones
are solved by conjugate gradients on products with J, and a step that is refused is halved.

The steps are as smooth as the model: where a unit lies on a kink, as ReLUs with target 0 do, rounding chooses its
side, so that a refined target may come out another, as good a one, in a batch of another size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.inversion.continuation import RestOf, continued
from fxinvert.inversion.stepping import TOLERANCE, Run, improve
from fxinvert.linalg.vectors import by_sample
from fxinvert.rules.certificate import relative

#: a sample whose error is more than this part of what it was before the step stagnates
SLOW = 0.9
#: how many more steps than before there are on each way of the continuation
MORE = 10


def refine(
    run: Run,
    start: Tensor,
    anchor: Tensor,
    goal: Tensor,
    steps: int,
    rest_of: RestOf | None = None,
    forbidden: Callable[[], Tensor] | None = None,
) -> Tensor:
    """A value that `run` brings closer to the goal than the one it starts from, for every sample by itself.

    Args:
        run: the rest of the model, `(B, …)` → `(B, …)`, samples independent.
        start: `(B, …)`, the target found so far.
        anchor: `(B, …)`, where samples start for which it is better, and those that stagnate start again.
        goal: `(B, …)`, what `run` should give.
        steps: the largest number of steps per sample.
        rest_of: `run` for some samples, with kinks that can be rounded off: what misses takes up to `MORE` times as many
            steps on each way of the continuation. None: it does not.
        forbidden: tells which samples, `(B,)`, are known to miss whatever their value is: they are not worth that.
    """
    with torch.no_grad():
        value, error = _stepped(run, start, anchor, goal, steps, rest_of)
        missed = (error > TOLERANCE) & torch.isfinite(error)
        if rest_of is None or not bool(missed.any()):
            return value
        rows = (missed if forbidden is None else missed & ~forbidden()).nonzero()[:, 0]
        value[rows] = continued(rest_of, rows, value[rows], anchor[rows], goal[rows], MORE * steps)
        return value


def _stepped(
    run: Run, start: Tensor, anchor: Tensor, goal: Tensor, steps: int, rest_of: RestOf | None
) -> tuple[Tensor, Tensor]:
    """The best values of plain Gauss–Newton, and their errors; what is done leaves the others where it can."""
    error, fallback = (relative(run(value) - goal, goal) for value in (start, anchor))
    fresh = fallback < error
    value, error = torch.where(by_sample(fresh, start), anchor, start), torch.where(fresh, fallback, error)
    best, least = value.clone(), error.clone()
    caution = torch.zeros_like(error)
    given_up = torch.zeros_like(fresh)
    here = torch.arange(len(error), device=error.device)
    for _ in range(steps):
        active = (least[here] > TOLERANCE) & ~given_up
        count = int(active.sum())
        if not count:
            break
        if rest_of is not None and count <= len(here) / 2:
            some = active.nonzero()[:, 0]
            here, value, error, anchor, goal = here[some], value[some], error[some], anchor[some], goal[some]
            caution, fresh, fallback = caution[some], fresh[some], fallback[some]
            given_up, active, run = given_up[some], active[some], rest_of(here)
        before = error
        value, error, caution, improved = improve(run, value, goal, error, caution, active)
        better = error < least[here]
        best[here] = torch.where(by_sample(better, value), value, best[here])
        least[here] = torch.where(better, error, least[here])
        again = active & ~fresh & (error > SLOW * before) & (least[here] > TOLERANCE)
        given_up = given_up | (active & ~improved & ~again)
        fresh = fresh | again
        value = torch.where(by_sample(again, value), anchor, value)
        error = torch.where(again, fallback, error)
        caution = torch.where(again, 0, caution)
    return best, least
