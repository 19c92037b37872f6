"""The inverse of a scalar function, entry by entry: in blocks that fit the processor's cache, or by a compiled kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxinvert.linalg.memory import waits
from fxinvert.rules.branches import Branch, Spare
from fxinvert.rules.certificate import Inverse, Status, certified, reached, relative
from fxinvert.rules.choice import choice
from fxinvert.rules.kernels import Kernel, kernel
from fxinvert.rules.op import Op

#: values that are worked on at once: what an op reads and writes of them stays in the cache
BLOCK = 1 << 17


def invert_branches(op: Op, target: Tensor, branches: tuple[Branch, ...]) -> Inverse:
    """Nearest pre-image of `target` over all branches, entry by entry.

    An entry stays at its anchor unless it can come closer to the target. An infinite anchor stays in any case, as of scores
    that a mask hides: no other value is at a finite distance from it.
    """

    def facts(found: Tensor) -> dict[str, Any]:
        outside = _outside(op, target, branches)
        hit = reached(relative(found - target, target), target.dtype)
        best = Status.NEAREST if len(branches) > 1 else Status.EXACT
        status = Status.PROJECTED if outside else best if hit else Status.LEAST_SQUARES
        return {"status": status, "projected": outside}

    # half precisions cannot tell 1 from 1 − MARGIN
    working = torch.promote_types(target.dtype, torch.float32)
    if op.settings.compiled and op.anchor.numel() and not op.by_sample:
        value, total = _fused(op, target, branches, working)
        return certified(op, target, value, facts, total=total)
    value = torch.empty_like(op.anchor)
    # that nothing overflows is looked at afterwards, which costs less than to prevent it; not so where digits are cut
    # off, or where looking waits for a device
    careful = value.dtype != working or waits(value)
    total = _fill(value, op, target, branches, working, careful)
    if not careful and not math.isfinite(total):
        total = _fill(value, op, target, branches, working, careful=True)
    if waits(value) or not math.isfinite(total):
        value = _held(value, op.anchor)
    return certified(op, target, value, facts, total=None if waits(value) else total)


def _held(value: Tensor, anchor: Tensor) -> Tensor:
    """The anchor where it is infinite. Where a choice is made by weights, it has given no finite number there."""
    # torch's compiler asks value by value for `isinf`, which takes several times as long as all else
    return torch.where(anchor.abs() == math.inf, anchor, value)


def _fill(
    value: Tensor, op: Op, target: Tensor, branches: tuple[Branch, ...], working: torch.dtype, careful: bool
) -> float:
    """Writes the answer, block by block; returns a sum that is finite only if all answers, anchors and targets are.

    It is of the answers' products with anchors and targets, or anchors alone where targets are as finite as answers;
    nothing is summed where looking waits for a device.
    Without care answers may overflow, and blocks are looked at for targets beyond an end that is only approached:
    mostly there are none, and nothing has to be done about them.
    """
    inner, least, most = _inner(branches)
    choose, choose_inner = choice(branches), choice(inner)
    total, looks, spare = 0.0, not waits(value), Spare()
    # where answers are as finite as targets, these need not be looked at
    endless = len(branches) == 1 and branches[0].endless
    for own, x, t, y in _blocks(op, value, op.anchor, target, op.output):
        if own.dtype != working:
            x, t, y = x.to(working), t.to(working), y.to(working)
        inside = not careful and _between(t, least, most)
        found = (choose_inner if inside else choose)(
            x, t, y, own.dtype, own if own.dtype == working else torch.empty_like(x), careful, spare
        )
        if found is not own:
            own.copy_(found)
        if looks:  # while they are in the cache
            flat = found.reshape(-1)
            # an infinite anchor leaves no finite product, even with 0
            total += float(torch.dot(flat, x.reshape(-1)))
            if not inside or not (endless or math.isfinite(most - least)):
                total += float(torch.dot(flat, t.reshape(-1)))
    return total


def _between(target: Tensor, least: float, most: float) -> bool:
    """Whether all targets lie between two numbers, if these are finite."""
    low = least == -math.inf or float(target.amin()) > least
    return low and (most == math.inf or float(target.amax()) < most)


def _fused(
    op: Op, target: Tensor, branches: tuple[Branch, ...], working: torch.dtype
) -> tuple[Tensor, float | None]:
    """The same by a kernel: the answer, and a number like the sum, if looking at it does not wait for a device.

    That no target lies beyond an end, and no answer overflows, is looked at afterwards; only where it is not so, another
    kernel makes the answers again, with care.
    """
    given = op.anchor, target, op.output
    # one kernel for any number of axes, where these do not matter
    rows = tuple((v.reshape(-1) if _numbers_alone(op) else v).contiguous() for v in given)
    inner, least, most = _inner(branches)
    looked_at = not waits(target)

    def run(careful: bool) -> tuple[Tensor, ...]:
        def build() -> Kernel:
            choose = choice(branches if careful else inner)

            def function(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
                wanted, bounded = t.to(working), careful or x.dtype != working
                out = torch.empty_like(wanted)
                found = choose(x.to(working), wanted, y.to(working), x.dtype, out, bounded, Spare())
                answers = found.to(x.dtype)
                if careful:
                    answers = _held(answers, x)
                if not looked_at:
                    return (answers,)
                looks = () if careful or inner is branches else (wanted.amin(), wanted.amax())
                # infinite or no number where one of them is
                return answers, (found * wanted + x).abs().amax(), *looks

            return kernel(op, function, rows, exact=careful)

        key = (kernel, careful, rows[0].shape[1:], rows[0].dtype, rows[0].device)
        made: Kernel = op.cache.get(key, tuple(op.parameters.values()), build)
        return made(*rows)

    if not looked_at:
        return run(careful=True)[0].view(op.anchor.shape), None
    value, total, *looks = run(careful=False)
    inside = not looks or (float(looks[0]) > least and float(looks[1]) < most)
    if not (inside and math.isfinite(total)):
        value, total = run(careful=True)
    return value.view(op.anchor.shape), float(total)


def _inner(branches: tuple[Branch, ...]) -> tuple[tuple[Branch, ...], float, float]:
    """A single branch without those ends of its image that are only approached, and these: all targets lie between them."""
    branch = branches[0]
    if len(branches) > 1 or not branch.numeric or not (branch.open_least or branch.open_most):
        return branches, -math.inf, math.inf
    return _opened(branch)


@functools.lru_cache(maxsize=128)
def _opened(branch: Branch) -> tuple[tuple[Branch], float, float]:
    least, most = float(branch.least), float(branch.most)
    low, high = (-math.inf if branch.open_least else least), (math.inf if branch.open_most else most)
    opened = replace(branch, least=low, most=high, open_least=False, open_most=False)
    return (opened,), least if branch.open_least else -math.inf, most if branch.open_most else math.inf


def _numbers_alone(op: Op) -> bool:
    """Whether all parameters are single numbers."""
    return all(p.numel() == 1 and p.dim() < 2 for p in op.parameters.values())


def _blocks(op: Op, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, all of the anchor's shape, in parts."""
    first = tensors[0]
    if not first.numel():
        return
    parts = -(-first.numel() // BLOCK)
    if first.device.type != "cpu" or parts == 1:
        yield tensors
    elif _numbers_alone(op) and all(v.is_contiguous() for v in tensors):
        yield from zip(*(v.view(-1).chunk(parts) for v in tensors), strict=True)
    elif any(p.dim() == first.dim() and len(p) > 1 for p in op.parameters.values()):
        yield tensors  # parameters that are the samples' own
    else:
        yield from zip(*(v.chunk(parts) for v in tensors), strict=True)


def _outside(op: Op, target: Tensor, branches: tuple[Branch, ...]) -> int:
    """How many target values no candidate reaches."""
    count = 0
    for t, y in _blocks(op, target, op.output):
        wanted = t.to(torch.promote_types(t.dtype, torch.float32))
        errors = [branch.value(wanted) - wanted for branch in branches] + [y - wanted]
        missed = functools.reduce(torch.minimum, (error.abs_() for error in errors)) > 0
        count += int(missed.sum())
    return count
