"""Refine: Gauss–Newton on the rest of the model, from the target that the node-by-node pass has found.

The node-by-node pass inverts one op at a time, so that the errors of unattainable targets add up on the way to the
input. Where the model, run forward from a node's target x, misses the output target t, steps

    x ← x + α Jᵀ(JJᵀ + εI)⁻¹ (t − f(x))

follow, f the model from that node on and J its Jacobian at x, sample by sample. For ε → 0 that is J⁺, the smallest
step that removes the linearized error; ε is of the size of the rounding errors of JJᵀ. α is halved until the
sample's error falls, and a sample for which no step helps keeps what it has: an error never grows. Samples whose
target misses by more than their anchor does start at the anchor.

The steps are as smooth as the model: where a unit lies on a kink, as ReLUs with target 0 do, rounding chooses its
side, so that a refined target may come out another, as good a one, in a batch of another size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.rules.certificate import relative

#: ‖f(x) − t‖ / ‖t‖ at which a sample is done
TOLERANCE = 1e-3
#: how often a step is halved before it is given up
HALVINGS = 8
#: largest Jacobian of a batch, in entries
LARGEST_JACOBIAN = 2**28


def refine(
    run: Callable[[Tensor], Tensor], start: Tensor, anchor: Tensor, goal: Tensor, steps: int
) -> Tensor:
    """A value that `run` brings closer to the goal than the one it starts from, for every sample by itself.

    Args:
        run: the rest of the model, `(B, …)` → `(B, …)`, samples independent.
        start: `(B, …)`, the target found so far.
        anchor: `(B, …)`, where to start the samples for which it is better.
        goal: `(B, …)`, what `run` should give.
        steps: the largest number of steps per sample.

    Raises:
        DataError: the Jacobian of the batch is too large to be formed.
    """
    size = start.numel() * math.prod(goal.shape[1:])
    if size > LARGEST_JACOBIAN:
        raise DataError(
            f"refining needs the Jacobian of {tuple(goal.shape)} with respect to {tuple(start.shape)}, "
            f"{size:,} entries; give smaller batches, or refine=0"
        )
    with torch.no_grad():
        value, error = _better(run, start, anchor, goal)
        unfinished = error > TOLERANCE
        for _ in range(steps):
            if not bool(unfinished.any()):
                break
            step = _gauss_newton(run, value, goal, unfinished)
            value, error, improved = _line_search(run, value, step, goal, error)
            unfinished = improved & (error > TOLERANCE)
    return value


def _better(
    run: Callable[[Tensor], Tensor], start: Tensor, anchor: Tensor, goal: Tensor
) -> tuple[Tensor, Tensor]:
    """For every sample the one of two values that has the smaller error, with that error; the first if both do."""
    error, other = (relative(run(value) - goal, goal) for value in (start, anchor))
    nearer = other < error
    return torch.where(_like(nearer, start), anchor, start), torch.where(nearer, other, error)


def _like(rows: Tensor, value: Tensor) -> Tensor:
    """Per-sample values `(B,)` that broadcast to `(B, …)`."""
    return rows.reshape(-1, *[1] * (value.dim() - 1))


def _gauss_newton(run: Callable[[Tensor], Tensor], value: Tensor, goal: Tensor, unfinished: Tensor) -> Tensor:
    """Jᵀ(JJᵀ + εI)⁻¹ (t − f(x)) for the unfinished samples, 0 for the others; the small system in float64."""
    jacobian, output = _jacobian(run, value)
    rows = unfinished[:, None]
    error = torch.where(rows, (goal - output).flatten(1), 0).double()
    gram = torch.einsum("bmn,bkn->bmk", jacobian, jacobian).double()
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    floor = torch.finfo(value.dtype).eps * trace + torch.finfo(torch.float64).tiny ** 0.5
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram + floor[:, None, None] * identity, error).to(value.dtype)
    step = torch.einsum("bmn,bm->bn", jacobian, weights)
    return torch.where(rows, step, 0).reshape(value.shape)  # a finished sample may be anything, NaN too


def _jacobian(run: Callable[[Tensor], Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
    """The samples' Jacobians `(B, outputs, inputs)` and the output; one backward pass per output."""
    with torch.enable_grad():
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


def _line_search(
    run: Callable[[Tensor], Tensor], value: Tensor, step: Tensor, goal: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every sample's longest of the steps 1, ½, ¼, … that lowers its error: (value, error, which found one)."""
    improved = torch.zeros_like(error, dtype=torch.bool)
    for halving in range(HALVINGS):
        trial = value + step * 0.5**halving
        reached = relative(run(trial) - goal, goal)
        accepted = ~improved & (reached < error)
        value = torch.where(_like(accepted, value), trial, value)
        error = torch.where(accepted, reached, error)
        improved = improved | accepted
        if bool((improved | ~step.flatten(1).any(1)).all()):
            break
    return value, error, improved
