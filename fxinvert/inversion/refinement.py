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

What sticks all the same sticks at kinks: a step that is right on the near side of a ReLU's kink is wrong beyond it, and a dead
one tells no direction at all. Such samples start once more from their anchors, on the model with its kinks rounded off
(`rest.py`), and the kinks become narrower as the goal is reached: the way to it is smooth, and ends at a value of the
model itself (smoothing continuation: Chen & Mangasarian 1996). From the best that was found, rounds of the same follow,
with kinks that are narrow from the start: they lead off the kinks at which it sticks, and not far away.

An output of at most some hundred numbers has a Jacobian of as many rows, found by one batched backward pass. Larger ones
are solved by conjugate gradients on products with J, and a step that is refused is halved.

The steps are as smooth as the model: where a unit lies on a kink, as ReLUs with target 0 do, rounding chooses its
side, so that a refined target may come out another, as good a one, in a batch of another size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.jacobian import Jacobian, differentiable
from fxinvert.linalg.solvers import cgls
from fxinvert.rules.certificate import relative

#: ‖f(x) − t‖ / ‖t‖ at which a sample is done
TOLERANCE = 1e-3
#: outputs of more numbers than this are not differentiated row by row, but by so many products for a step
ROWS, PRODUCTS = 256, 25
#: of the rows, so many in one backward pass
AT_ONCE = 64
#: how exactly the conjugate gradients solve, relative to the error
INNER = 0.03
#: how often a step is tried, and what damping changes by: relative to trace JJᵀ, from the first on that is more than rounding
TRIALS, FACTOR, FIRST = 8, 10.0, 1e-5
#: a sample whose error is more than this part of what it was before the step stagnates
SLOW = 0.9
#: how wide kinks are at first, at the end, and by which factor they become narrower
WIDE, NARROW, NARROWER = 0.3, 1e-5, 0.5
#: how wide they are at first in a round, one after the other; the part of the error that a round may leave for another
#: to follow, and how many there are at most
ROUND, LEFT, ROUNDS = (0.1, 0.03, 0.01), 0.98, 20
#: in a round: steps with kinks of one first width, steps at one width, and how wide kinks are at the end
TURN, BRIEF, FINE = 16, 4, 1e-3
#: steps at one width, at most, and how many more steps than before there are in all
PATIENCE, MORE = 8, 3

Run = Callable[[Tensor], Tensor]
#: the rest of the model for some samples, `(k,)`: a function of their values and the widths of the kinks, or None
Smoothed = Callable[[Tensor], Callable[[Tensor, Tensor | None], Tensor]]
#: the step of every sample for its place on the way from the boldest, 0, to the most cautious
Steps = Callable[[Tensor], Tensor]


def refine(
    run: Run, start: Tensor, anchor: Tensor, goal: Tensor, steps: int, smoothed: Smoothed | None = None
) -> Tensor:
    """A value that `run` brings closer to the goal than the one it starts from, for every sample by itself.

    Args:
        run: the rest of the model, `(B, …)` → `(B, …)`, samples independent.
        start: `(B, …)`, the target found so far.
        anchor: `(B, …)`, where samples start for which it is better, and those that stagnate start again.
        goal: `(B, …)`, what `run` should give.
        steps: the largest number of steps per sample; there are `MORE` times as many on the smoothed model.
        smoothed: the same with its kinks rounded off; None where it has none.
    """
    with torch.no_grad():
        value, error = _stepped(run, start, anchor, goal, steps)
        rows = ((error > TOLERANCE) & torch.isfinite(error)).nonzero()[:, 0]
        if smoothed is None or not len(rows):
            return value
        value = value.clone()
        value[rows] = _continued(smoothed(rows), value[rows], anchor[rows], goal[rows], MORE * steps)
        for _ in range(ROUNDS):
            soft, before = smoothed(rows), value[rows]
            for width in ROUND:
                value[rows] = _continued(
                    soft, value[rows], value[rows], goal[rows], TURN, width=width, narrow=FINE, patience=BRIEF
                )
            error, after = (relative(soft(v, None) - goal[rows], goal[rows]) for v in (before, value[rows]))
            rows = rows[(after > TOLERANCE) & (after < LEFT * error)]
            if not len(rows):
                break
        return value


def _stepped(run: Run, start: Tensor, anchor: Tensor, goal: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The best values of plain Gauss–Newton, and their errors."""
    error, fallback = (relative(run(value) - goal, goal) for value in (start, anchor))
    fresh = fallback < error
    value, error = torch.where(_like(fresh, start), anchor, start), torch.where(fresh, fallback, error)
    best, least = value, error
    caution = torch.zeros_like(error)
    given_up = torch.zeros_like(fresh)
    for _ in range(steps):
        active = (least > TOLERANCE) & ~given_up
        if not bool(active.any()):
            break
        before = error
        value, error, caution, improved = _improve(run, value, goal, error, caution, active)
        better = error < least
        best, least = torch.where(_like(better, best), value, best), torch.where(better, error, least)
        again = active & ~fresh & (error > SLOW * before) & (least > TOLERANCE)
        given_up = given_up | (active & ~improved & ~again)
        fresh = fresh | again
        value, error = (
            torch.where(_like(again, value), anchor, value),
            torch.where(again, fallback, error),
        )
        caution = torch.where(again, 0, caution)
    return best, least


def _continued(
    run: Callable[[Tensor, Tensor | None], Tensor],
    found: Tensor,
    start: Tensor,
    goal: Tensor,
    steps: int,
    *,
    width: float = WIDE,
    narrow: float = NARROW,
    patience: int = PATIENCE,
) -> Tensor:
    """The best of what was found and of the values on the way from wide kinks to narrow ones."""

    def missed(value: Tensor, widths: Tensor | None) -> Tensor:
        return relative(run(value, widths) - goal, goal)

    best, least = found, missed(found, None)
    value, widths = start, torch.full_like(least, width)
    caution, age = torch.zeros_like(least), torch.zeros_like(least)
    for _ in range(steps):
        active = (least > TOLERANCE) & (widths > narrow)
        if not bool(active.any()):
            break
        soft = _at(run, widths)
        value, error, caution, improved = _improve(soft, value, goal, missed(value, widths), caution, active)
        hard = missed(value, None)
        better = active & (hard < least)
        best, least = torch.where(_like(better, best), value, best), torch.where(better, hard, least)
        age = age + 1
        through = (error <= TOLERANCE) | ~improved | (age >= patience)
        widths = torch.where(through, NARROWER * widths, widths)
        caution, age = torch.where(improved, caution, 0), torch.where(through, 0, age)
    return best


def _at(run: Callable[[Tensor, Tensor | None], Tensor], widths: Tensor) -> Run:
    return lambda value: run(value, widths)


def _improve(
    run: Run, value: Tensor, goal: Tensor, error: Tensor, caution: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every active sample's boldest step that lowers its error: (value, error, caution, which found one)."""
    find = _by_rows if goal[:1].numel() <= ROWS else _by_products
    step_of = find(run, value, goal, active)
    improved, still = torch.zeros_like(active), active
    origin = value
    for _ in range(TRIALS):
        step = torch.where(_like(still, origin), step_of(caution), 0)
        trial = origin + step
        reached = relative(run(trial) - goal, goal)
        accepted = still & (reached < error)
        value = torch.where(_like(accepted, value), trial, value)
        error = torch.where(accepted, reached, error)
        improved, still = improved | accepted, still & ~accepted & step.flatten(1).any(1)
        caution = torch.where(accepted, (caution - 1).clamp(min=0), caution + still)
        if not bool(still.any()):
            break
    return value, error, caution, improved


def _by_rows(run: Run, value: Tensor, goal: Tensor, active: Tensor) -> Steps:
    """Jᵀ(JJᵀ + μI)⁻¹ (t − f(x)), more μ for more caution; the small system in float64."""
    jacobian, output = _jacobian(run, value)
    error = torch.where(active[:, None], goal.flatten(1) - output, 0).double()
    gram = (jacobian @ jacobian.mT).double()
    # a sample that is not active may be anything, NaN too
    gram = torch.where(active[:, None, None], gram, 0)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    least = torch.finfo(value.dtype).eps
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    tiny = torch.finfo(torch.float64).tiny ** 0.5

    def step_of(caution: Tensor) -> Tensor:
        damping = torch.where(caution > 0, FIRST * FACTOR ** (caution.double() - 1), least) * trace + tiny
        weights = torch.linalg.solve(gram + damping[:, None, None] * identity, error).to(value.dtype)
        return torch.einsum("bmn,bm->bn", jacobian, weights).reshape(value.shape)

    return step_of


def _by_products(run: Run, value: Tensor, goal: Tensor, active: Tensor) -> Steps:
    """A step of truncated conjugate gradients, shorter by half for every bit of caution."""
    nothing = torch.zeros(len(value), dtype=value.dtype, device=value.device)
    try:
        jacobian = Jacobian(run, value)
    except SolveError:  # nothing that follows depends on the value
        return lambda caution: torch.zeros_like(value)
    missing = torch.where(_like(active, goal), goal - run(value), 0)
    size = missing.flatten(1).norm(dim=1)
    found = cgls(
        jacobian, missing, nothing, largest=nothing, tolerance=0.0, small_enough=INNER * size, limit=PRODUCTS,
        skip=~active,
    )  # fmt: skip
    return lambda caution: _like(0.5**caution, value) * found.correction


def _jacobian(run: Run, value: Tensor) -> tuple[Tensor, Tensor]:
    """The samples' Jacobians `(B, outputs, inputs)` and the output."""
    with torch.enable_grad(), differentiable():
        x = value.detach().requires_grad_()
        output = run(x).flatten(1)
        if not output.requires_grad:
            return value.new_zeros(*output.shape, value[0].numel()), output
        rows = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        return torch.cat([_rows(output, x, some) for some in torch.split(rows, AT_ONCE)], 1), output.detach()


def _rows(output: Tensor, x: Tensor, some: Tensor) -> Tensor:
    """Some rows of the Jacobians, `(B, k, inputs)`, for as many unit vectors `(k, outputs)`."""

    def pulled(cotangent: Tensor, batched: bool) -> Tensor:
        return torch.autograd.grad(
            output, x, cotangent, retain_graph=True, materialize_grads=True, is_grads_batched=batched
        )[0]

    cotangents = some[:, None].expand(-1, len(x), -1)
    try:
        rows = pulled(cotangents, batched=True)
    except RuntimeError:  # an op on the way has no batched derivative
        rows = torch.stack([pulled(cotangent, batched=False) for cotangent in cotangents])
    return rows.flatten(2).transpose(0, 1)


def _like(rows: Tensor, value: Tensor) -> Tensor:
    """Per-sample values `(B,)` that broadcast to `(B, …)`."""
    return rows.reshape(-1, *[1] * (value.dim() - 1))
