"""Stepping: a Gauss–Newton step for every sample, as bold as lowers its error (`refinement.py`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.jacobian import Jacobian, differentiable
from fxinvert.linalg.solvers import cgls
from fxinvert.linalg.vectors import norm, per_sample

#: relative to the output target, what a sample that is done misses at most
TOLERANCE = 1e-3
#: outputs of more numbers than this are not differentiated row by row, but by so many products for a step
ROWS, PRODUCTS = 256, 25
#: of the rows, so many in one backward pass
AT_ONCE = 64
#: how exactly the conjugate gradients solve, relative to the error
INNER = 0.03
#: how often a step is tried, and what damping changes by: relative to trace JJᵀ, from the first on that is more than rounding
TRIALS, FACTOR, FIRST = 8, 10.0, 1e-5
Run = Callable[[Tensor], Tensor]
#: the step of every sample for its place on the way from the boldest, 0, to the most cautious
Steps = Callable[[Tensor], Tensor]


def improve(
    miss: Run, value: Tensor, error: Tensor, caution: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every active sample's boldest step that lowers its error: (value, error, caution, which found one).

    The error is the norm of what it misses, `(B, …)` → `(B, n)`. A step that is refused adds 1 to the caution, one that is
    taken removes 1.
    """
    missed = torch.where(active[:, None], miss(value), 0)
    step_of = (_by_rows if missed.shape[1] <= ROWS else _by_products)(miss, value, missed, active)
    improved, still = torch.zeros_like(active), active
    origin = value
    for _ in range(TRIALS):
        step = torch.where(per_sample(still, origin), step_of(caution), 0)
        trial = origin + step
        reached = norm(miss(trial))
        accepted = still & (reached < error)
        value = torch.where(per_sample(accepted, value), trial, value)
        error = torch.where(accepted, reached, error)
        improved, still = improved | accepted, still & ~accepted & step.flatten(1).any(1)
        caution = torch.where(accepted, (caution - 1).clamp(min=0), caution + still)
        if not bool(still.any()):
            break
    return value, error, caution, improved


def _by_rows(miss: Run, value: Tensor, missed: Tensor, active: Tensor) -> Steps:
    """−Jᵀ(JJᵀ + μI)⁻¹ r, more μ for more caution; the small system in float64."""
    jacobian = jacobian_rows(miss, value)
    gram = (jacobian @ jacobian.mT).double()
    # a sample that is not active may be anything, NaN too
    gram = torch.where(active[:, None, None], gram, 0)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    least = torch.finfo(value.dtype).eps
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    tiny = torch.finfo(torch.float64).tiny ** 0.5

    def step_of(caution: Tensor) -> Tensor:
        damping = torch.where(caution > 0, FIRST * FACTOR ** (caution.double() - 1), least) * trace + tiny
        weights = torch.linalg.solve(gram + damping[:, None, None] * identity, -missed.double())
        return torch.einsum("bmn,bm->bn", jacobian, weights.to(value.dtype)).reshape(value.shape)

    return step_of


def _by_products(miss: Run, value: Tensor, missed: Tensor, active: Tensor) -> Steps:
    """A step of truncated conjugate gradients, shorter by half for every bit of caution."""
    nothing = torch.zeros(len(value), dtype=value.dtype, device=value.device)
    try:
        jacobian = Jacobian(miss, value)
    except SolveError:  # nothing that follows depends on the value
        return lambda caution: torch.zeros_like(value)
    found = cgls(
        jacobian, -missed, nothing, largest=nothing, tolerance=0.0, small_enough=INNER * norm(missed), limit=PRODUCTS,
        skip=~active,
    )  # fmt: skip
    return lambda caution: per_sample(0.5**caution, value) * found.correction


def jacobian_rows(run: Run, value: Tensor) -> Tensor:
    """The samples' Jacobians `(B, outputs, inputs)`."""
    with torch.enable_grad(), differentiable():
        x = value.detach().requires_grad_()
        output = run(x).flatten(1)
        if not output.requires_grad:
            return value.new_zeros(*output.shape, value[0].numel())
        rows = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        return torch.cat([_rows(output, x, some) for some in torch.split(rows, AT_ONCE)], 1)


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
