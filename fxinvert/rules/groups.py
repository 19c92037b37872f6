"""What rules share whose op combines the entries of a group (a channel, a row, a window) and no others.

A group is the last axis of a view of the input. Groups do not see each other, so each is answered, kept and counted
by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules.affine import Rows
from fxinvert.rules.certificate import Inverse, Status, certified, relative
from fxinvert.rules.op import Op


def axes(op: Op, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """The axes over which an op combines entries, counted from the front.

    Raises:
        NoRuleError: the samples of a batch are among them.
    """
    n = op.anchor.dim()
    given = range(n) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    found = tuple(axis % n for axis in given)
    if 0 in found:
        raise NoRuleError(
            f"node {op.name!r}, {op.key}: it combines the samples of a batch (dim={dim}), so that no sample has a "
            "target of its own; reduce over the other dimensions"
        )
    return found


def along(dims: Sequence[int]) -> Rows:
    """The entries along some axes are a group: `(B, …)` → `(B, …, entries)`."""
    last = tuple(range(-len(dims), 0))

    def join(value: Tensor, like: Tensor) -> Tensor:
        sizes = [like.shape[axis] for axis in dims]
        return value.reshape(*value.shape[:-1], *sizes).movedim(last, tuple(dims))

    return Rows(lambda value: value.movedim(tuple(dims), last).flatten(-len(dims)), join)


def per_group(value: Tensor, anchor: Tensor) -> Tensor:
    """One value per group: a reduction's output, its axes kept or not, as `(B, …, 1)` like `along` has it."""
    kept = anchor.shape[:-1]
    return value.reshape(*kept, 1)


def settled(
    op: Op,
    target: Tensor,
    value: Tensor,
    inputs: Rows,
    outputs: Rows,
    *,
    stay: Tensor | None = None,
    outside: Tensor | None = None,
    doubtful: Tensor | None = None,
    damped: Tensor | None = None,
    damping: float = 0.0,
    iterations: int = 0,
    total: float | None = None,
) -> Inverse:
    """The answer, with the certificate measured on it.

    A group whose target is its output stays at its anchor bit for bit, and so does one whose target lay outside the
    range, or whose correction was damped, and that has come no closer. A group whose target lay outside the range, and is
    missed by more than half of the digits, counts as projected, with all its values.

    Args:
        op: the op.
        target: `(B, …)`.
        value: the answer by groups.
        inputs, outputs: how input and output are laid out as groups; they agree but for the last axis.
        stay: `(B, …, 1)`, groups whose target is their output, if they are known.
        outside: `(B, …, 1)`, groups whose target was moved onto the op's range.
        doubtful: `(B, …, 1)`, those of them that may have come no closer; by default all that are outside.
        damped: `(B, …, 1)`, groups whose correction was damped.
        damping, iterations: for the certificate.
        total: a number that is finite only if all entries of target and answer are, if one is known.
    """
    anchor = op.anchor
    wanted, before = outputs.split(target), outputs.split(op.output)
    value = inputs.join(value, anchor).to(anchor.dtype)
    if stay is None:
        stay = torch.linalg.vector_norm(wanted - before, math.inf, dim=-1, keepdim=True) == 0
    if doubtful is None:
        doubtful = outside
    if doubtful is not None and bool(doubtful.any()):
        reached = outputs.split(op(value))
        stay = stay | doubtful & ~(_size(reached - wanted) <= _size(before - wanted))
    if bool(stay.any()):
        value = inputs.join(torch.where(stay, inputs.split(anchor), inputs.split(value)), anchor)

    def facts(found: Tensor) -> dict[str, Any]:
        reached = outputs.split(found)
        half = torch.finfo(target.dtype).eps ** 0.5
        none = torch.zeros_like(stay)
        held = none if damped is None else damped & ~stay
        missed = ~(_size(reached - wanted) <= half * _size(wanted)) & (none if outside is None else outside)
        projected = int((missed & ~held).sum()) * wanted.shape[-1]
        if bool(held.any()):
            status = Status.DAMPED
        elif projected:
            status = Status.PROJECTED
        else:
            hit = bool((relative(found - target, target) <= half).all())
            status = Status.NEAREST if hit else Status.LEAST_SQUARES
        return {
            "status": status,
            "damping": damping if bool(held.any()) else 0.0,
            "iterations": iterations,
            "projected": projected,
        }

    return certified(op, target, value, facts, total=total)


def _size(value: Tensor) -> Tensor:
    working = torch.promote_types(value.dtype, torch.float32)
    size: Tensor = torch.linalg.vector_norm(value, dim=-1, keepdim=True, dtype=working)
    return size
