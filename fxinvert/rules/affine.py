"""The helper for affine ops: give the linear part as an operator, and it solves the one equation.

x* = x0 + A⁺_λ (t − f(x0))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg import (
    Correction,
    Factor,
    Function,
    LinearOperator,
    factorize,
    solve_anchored,
    solve_diagonal,
)
from fxinvert.linalg.each import EachFunction, solve_each
from fxinvert.linalg.vectors import per_sample
from fxinvert.rules.certificate import Inverse, Status, certified, reached, relative
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
    factor = op.cache.get(shape, tuple(op.parameters.values()), lambda: _factorized(op, operator))
    solved = solve_anchored(factor, rows.split(shortfall(op, target)), op.settings)
    return moved(op, target, rows.join(solved.value, anchor), solved)


def invert_diagonal(op: Op, target: Tensor, scale: Tensor) -> Inverse:
    """The same for y = scale ⊙ x + constant; `scale` broadcasts to the anchor, one for all samples or one for each."""
    missing = shortfall(op, target)
    solved = solve_diagonal(scale.to(missing.dtype), missing, op.settings, overwrite=True)
    # in place: a new tensor costs more than the sum
    value = solved.value.add_(op.anchor).to(op.anchor.dtype)
    return _certified(op, target, value, solved)


def invert_by_autograd(op: Op, target: Tensor) -> Inverse:
    """Inverse of any op that is affine in its one anchor: the adjoint comes from autograd."""
    anchor = op.anchor
    if op.by_sample:
        missing = shortfall(op, target)
        solved = solve_each(EachFunction(op.evaluate, anchor, missing.dtype), missing, op.settings)
        return moved(op, target, solved.value, solved)
    return invert_affine(op, target, lambda: Function(op.evaluate, anchor.shape[1:], anchor))


def _working(dtype: torch.dtype) -> torch.dtype:
    """What is solved in: half precisions have too few digits to solve with."""
    return torch.promote_types(dtype, torch.float32)


def shortfall(op: Op, target: Tensor) -> Tensor:
    """r = t − f(x0), in the dtype that is solved in."""
    dtype = _working(target.dtype)
    return target.to(dtype) - op.output.to(dtype)


def _factorized(op: Op, operator: Callable[[], LinearOperator]) -> Factor:
    for name, value in op.parameters.items():
        if not bool(torch.isfinite(value).all()):
            raise SolveError(
                f"node {op.name!r}, {op.key}: its {name} {tuple(value.shape)} has NaN or infinite values, so nothing "
                "can be solved with it; load weights that are finite"
            )
    try:
        return factorize(operator().to(_working(op.anchor.dtype)), op.settings)
    except SolveError as error:
        raise SolveError(f"node {op.name!r}, {op.key}: {error}") from error


def moved(op: Op, target: Tensor, correction: Tensor, solved: Correction) -> Inverse:
    """The anchor with its correction, and the certificate, measured on what is returned.

    A sample for one of whose right-hand sides the solver did not converge is left at its anchor.
    """
    if solved.missed is not None:
        failed = _by_sample(solved.missed, len(op.anchor)) > 0
        correction = torch.where(per_sample(failed, correction), 0, correction)
    return _certified(op, target, (op.anchor + correction).to(op.anchor.dtype), solved)


def _certified(op: Op, target: Tensor, value: Tensor, solved: Correction) -> Inverse:
    def facts(found: Tensor) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if solved.missed is not None:
            status = Status.FAILED
            told["failed"] = _by_sample(solved.missed, len(value)) > 0
            told["reason"] = (
                f"the solver did not converge: a relative error of {float(solved.missed.max()):.1e} was left after "
                f"{solved.iterations} iterations"
            )
        elif bool(solved.damped.any()):
            status = Status.DAMPED
        elif not reached(relative(found - target, target), target.dtype):
            status = Status.LEAST_SQUARES
        else:
            status = Status.NEAREST if value.numel() > target.numel() else Status.EXACT
        return told | {
            "status": status,
            "damping": solved.damping,
            "iterations": solved.iterations,
            "condition": solved.condition,
        }

    return certified(op, target, value, facts)


def _by_sample(missed: Tensor, samples: int) -> Tensor:
    """The largest of every sample's right-hand sides."""
    return missed.reshape(samples, -1).amax(1)
