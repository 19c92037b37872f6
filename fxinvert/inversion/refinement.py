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

An output of few numbers has a Jacobian of few rows, one backward pass for each. Larger ones are solved by conjugate
gradients on products with J, and a step that is refused is halved.

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
ROWS, PRODUCTS = 64, 25
#: how exactly the conjugate gradients solve, relative to the error
INNER = 0.03
#: how often a step is tried, and what damping changes by: relative to trace JJᵀ, from the first on that is more than rounding
TRIALS, FACTOR, FIRST = 8, 10.0, 1e-5
#: a sample whose error is more than this part of what it was before the step stagnates
SLOW = 0.9

Run = Callable[[Tensor], Tensor]
#: the step of every sample for its place on the way from the boldest, 0, to the most cautious
Steps = Callable[[Tensor], Tensor]


def refine(run: Run, start: Tensor, anchor: Tensor, goal: Tensor, steps: int) -> Tensor:
    """A value that `run` brings closer to the goal than the one it starts from, for every sample by itself.

    Args:
        run: the rest of the model, `(B, …)` → `(B, …)`, samples independent.
        start: `(B, …)`, the target found so far.
        anchor: `(B, …)`, where samples start for which it is better, and those that stagnate start again.
        goal: `(B, …)`, what `run` should give.
        steps: the largest number of steps per sample.
    """
    with torch.no_grad():
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
    return best


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
    error = torch.where(active[:, None], (goal - output).flatten(1), 0).double()
    gram = torch.einsum("bmn,bkn->bmk", jacobian, jacobian).double()
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
    """The samples' Jacobians `(B, outputs, inputs)` and the output; one backward pass per output."""
    with torch.enable_grad(), differentiable():
        x = value.detach().requires_grad_()
        output = run(x)
        columns = output.flatten(1).sum(0)
        if not columns.requires_grad:
            return value.new_zeros(len(value), len(columns), value[0].numel()), output.detach()
        rows = [
            torch.autograd.grad(column, x, retain_graph=True, materialize_grads=True)[0].flatten(1)
            for column in columns
        ]
    return torch.stack(rows, 1), output.detach()


def _like(rows: Tensor, value: Tensor) -> Tensor:
    """Per-sample values `(B,)` that broadcast to `(B, …)`."""
    return rows.reshape(-1, *[1] * (value.dim() - 1))
