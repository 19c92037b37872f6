"""Ops that select, copy or move entries, or sum entries that they have moved: one line per op.

An op that moves is y = A x + constant, where A has entries 0 and 1 and at most one 1 in every row: each output is a
copy of one input, or a constant. Then AᵀA = diag(Aᵀ1) counts the copies, and

    x* = x0 + A⁺r,   A⁺r = Aᵀr / Aᵀ1,   r = t − f(x0),

the mean of what the copies ask for; inputs that are not copied stay where they are. The transpose of such an op sums
(fold sums overlapping patches): AAᵀ = diag(A1), so A⁺r = Aᵀ(r / A1). Aᵀ comes from autograd in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.linalg.vectors import per_sample
from fxinvert.rules.certificate import Inverse, Status, apart, certified, reached, relative
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule

Adjoint = Callable[[Tensor], Tensor]


def invert_movement(op: Op, target: Tensor) -> Inverse:
    """Every input gets the mean of the targets of its copies."""
    anchor = op.anchor
    output, adjoint = _transposed(op)
    counts = adjoint(torch.ones_like(output))
    _check_samples_apart(op, output, adjoint, counts)
    every_one_once = anchor.shape[1:].numel() == target.shape[1:].numel() and bool((counts == 1).all())
    if every_one_once and anchor.dtype == target.dtype == output.dtype:
        # of what only changes places there may be a view, which takes no memory
        return copied(op, target, adjoint(target), Status.PASSED_THROUGH)
    missing = adjoint(target.to(output.dtype) - op.output.to(output.dtype))
    # a single copy is taken as it is, or not at all: the difference to the anchor has been rounded
    single = torch.where(missing == 0, anchor, adjoint(target.to(output.dtype)).to(anchor.dtype))
    mean = (anchor + missing / counts.clamp(min=1)).to(anchor.dtype)
    value = torch.where(counts == 1, single, torch.where(counts == 0, anchor, mean))
    lost = bool((counts == 0).any())
    best = Status.PASSED_THROUGH if every_one_once else Status.NEAREST if lost else Status.EXACT
    return copied(op, target, value, best)


def invert_sums(op: Op, target: Tensor) -> Inverse:
    """What is missing from every sum, shared equally by its summands."""
    anchor = op.anchor
    output, adjoint = _transposed(op)
    with torch.no_grad():
        counts = op(torch.ones_like(anchor[:1], dtype=output.dtype))
    missing = target.to(output.dtype) - op.output.to(output.dtype)
    value = (anchor + adjoint(missing / counts.clamp(min=1))).to(anchor.dtype)
    fewer = anchor.shape[1:].numel() > target.shape[1:].numel()
    return copied(op, target, value, Status.NEAREST if fewer else Status.EXACT)


def _transposed(op: Op) -> tuple[Tensor, Adjoint]:
    """The op's output and r ↦ Aᵀr, in float32 at least where the op leaves the dtype alone.

    Raises:
        NoRuleError: the input is not one tensor, or the output does not depend on it differentiably.
    """
    anchor = op.anchor
    if not isinstance(anchor, Tensor):
        raise NoRuleError(
            f"node {op.name!r}, {op.key}: it takes one of several results of an op; no rule handles that yet"
        )
    with torch.enable_grad():
        x = anchor.detach().to(torch.promote_types(anchor.dtype, torch.float32)).requires_grad_()
        # what is held has the anchor's own dtype, and some ops take no other beside it
        alone = not any(held.is_floating_point() for held in op.parameters.values())
        y = op(x) if alone or x.dtype == anchor.dtype else op(x.to(anchor.dtype)).to(x.dtype)
    if not y.requires_grad:
        raise NoRuleError(f"node {op.name!r}, {op.key}: no gradient flows through it, so it has no inverse")

    def adjoint(r: Tensor) -> Tensor:
        if not x.numel():  # not every op can go back through nothing
            return torch.zeros_like(x)
        (pulled,) = torch.autograd.grad(y, x, r, retain_graph=True)
        return pulled

    return y.detach(), adjoint


def _check_samples_apart(op: Op, output: Tensor, adjoint: Adjoint, counts: Tensor) -> None:
    """Raises where entries move from one sample to another: the copies of sample i must lie in sample i."""
    batch = len(op.anchor)
    if output.dim() == 0 or len(output) != batch:
        raise _mixed(op)
    if batch > 1 and not op.cache.get(("apart", batch), (), lambda: _apart(output, adjoint, counts)):
        raise _mixed(op)


def _apart(output: Tensor, adjoint: Adjoint, counts: Tensor) -> bool:
    # copies whose sample numbers have the right mean and the right mean square all have the right number
    numbers = torch.arange(len(output), device=output.device).remainder(5).to(output.dtype)
    for mark in (numbers, numbers.square()):
        given, own = (per_sample(mark, value) for value in (output, counts))
        pulled = adjoint(given.expand_as(output))
        if not torch.allclose(pulled, own.to(pulled) * counts, rtol=torch.finfo(output.dtype).eps ** 0.5):
            return False
    return True


def _mixed(op: Op) -> NoRuleError:
    return NoRuleError(
        f"node {op.name!r}, {op.key}: it moves entries from one sample of the batch to another, so that no sample has "
        "a target of its own; keep the batch as the first axis"
    )


def copied(op: Op, target: Tensor, value: Tensor, best: Status) -> Inverse:
    """The answer with its certificate: the status is `best` where the target is reached."""

    def facts(found: Tensor) -> dict[str, Any]:
        residual = relative(apart(found, target), target)
        widest = max((target.dtype, value.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        return {
            "residual": residual,
            "status": best if reached(residual, widest) else Status.LEAST_SQUARES,
        }

    return certified(op, target, value, facts)


def moves(key: str) -> Rule:
    return Rule(key, invert_movement, Kind.MOVES)


def sums(key: str) -> Rule:
    return Rule(key, invert_sums, Kind.CLOSED_FORM)


def rules() -> list[Rule]:
    return [
        # order
        moves("permute"),
        moves("transpose"),
        moves("movedim"),
        moves("moveaxis"),
        moves("t"),
        moves("numpy_T"),
        moves("matrix_H"),
        moves("mT"),
        moves("mH"),
        moves("adjoint"),
        moves("getattr"),  # x.mT
        moves("flip"),
        moves("fliplr"),
        moves("flipud"),
        moves("roll"),
        moves("rot90"),
        moves("pixel_shuffle"),
        moves("pixel_unshuffle"),
        moves("channel_shuffle"),
        # selection
        moves("getitem"),
        moves("slice"),
        moves("select"),
        moves("narrow"),
        moves("index"),
        moves("index_select"),
        moves("gather"),
        moves("take_along_dim"),
        moves("diagonal"),
        moves("tril"),
        moves("triu"),
        moves("masked_fill"),
        moves("where"),
        # copies
        moves("expand"),
        moves("expand_as"),
        moves("broadcast_to"),
        moves("repeat"),
        moves("repeat_interleave"),
        moves("tile"),
        moves("pad"),
        moves("constant_pad_nd"),
        moves("diag_embed"),
        moves("unfold"),
        moves("im2col"),
        *[moves(f"{kind}_pad{n}d") for kind in ("reflection", "replication") for n in (1, 2, 3)],
        *[moves(f"upsample_nearest{n}d") for n in (1, 2, 3)],
        # sums of patches
        sums("fold"),
        sums("col2im"),
        # dtypes
        moves("to"),
        moves("type"),
        moves("type_as"),
        moves("float"),
        moves("double"),
        moves("half"),
        moves("bfloat16"),
        moves("cpu"),
    ]
