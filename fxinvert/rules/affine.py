"""The helper for affine ops: give the linear part as an operator, and it solves the one equation.

x* = x0 + A⁺_λ (t − f(x0))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg import (
    Correction,
    Factor,
    Function,
    LinearOperator,
    SolveSettings,
    factorize,
    solve_anchored,
)
from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.op import Op


@dataclass(frozen=True)
class Rows:
    """Layout of independent right-hand sides, where they are not simply the samples.

    Attributes:
        split: `(B, …)` → `(rows, …)`.
        join: `(rows, …)` → the shape of a second tensor.
    """

    split: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]


def _last_channels(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


SAMPLES = Rows(lambda value: value, lambda value, like: value)
#: every position's last axis is a right-hand side: `(B, …, n)` → `(B·…, n)`
LAST_AXIS = Rows(lambda value: value.flatten(0, -2), torch.Tensor.reshape_as)
#: every position's channels are one: `(B, C, …)` → `(B·…, C)`
PIXELS = Rows(lambda value: value.movedim(1, -1).flatten(0, -2), _last_channels)


def channels(spatial: int) -> Rows:
    """The op treats every channel alike and apart: `(B, C, *spatial)` → `(B·C, 1, *spatial)`."""
    return Rows(
        lambda value: value.reshape(-1, 1, *value.shape[value.dim() - spatial :]), torch.Tensor.reshape_as
    )


def invert_affine(
    op: Op, target: Tensor, operator: Callable[[], LinearOperator], rows: Rows = SAMPLES
) -> Inverse:
    """Nearest of the inputs that come closest to `target`, for an op with linear part `operator`.

    Args:
        op: the op.
        target: `(B, …)`.
        operator: builds the linear part; called only when the parameters have changed.
        rows: how anchors and targets are laid out as independent right-hand sides, where that is not the batch.
    """
    anchor = op.anchor
    shape = (tuple(anchor.shape[1:]), anchor.dtype, anchor.device)
    linear, factor = op.cache.get(
        shape, tuple(op.parameters.values()), lambda: _factorized(operator, op.settings)
    )
    solved = solve_anchored(linear, factor, rows.split(target - op.output), op.settings)
    value = anchor + rows.join(solved.value, anchor)
    return Inverse(value, _certificate(target, anchor, value, rows.join(solved.left, target), solved))


def invert_by_autograd(op: Op, target: Tensor) -> Inverse:
    """Inverse of any op that is affine in its one anchor: the adjoint comes from autograd."""
    anchor = op.anchor
    return invert_affine(op, target, lambda: Function(op.evaluate, anchor.shape[1:], anchor))


def _factorized(
    operator: Callable[[], LinearOperator], settings: SolveSettings
) -> tuple[LinearOperator, Factor]:
    linear = operator()
    return linear, factorize(linear, settings)


def _certificate(
    target: Tensor, anchor: Tensor, value: Tensor, left: Tensor, solved: Correction
) -> Certificate:
    residual = relative(left, target)
    # half of the digits: what a solve may lose to conditioning before its answer counts as a miss
    reached = residual <= torch.finfo(target.dtype).eps ** 0.5
    if bool(solved.damped.any()):
        status = Status.DAMPED
    elif not bool(reached.all()):
        status = Status.LEAST_SQUARES
    else:
        status = Status.NEAREST if anchor.numel() > target.numel() else Status.EXACT
    return Certificate(
        status=status,
        residual=residual,
        distance=row_norms(value - anchor),
        failed=torch.zeros_like(residual, dtype=torch.bool),
        damping=solved.damping,
        iterations=solved.iterations,
        condition=solved.condition,
    )
