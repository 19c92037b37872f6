"""Pooling: averages are affine, maxima have a closed form. One line per op."""

from __future__ import annotations

import torch
from torch import Tensor

from fxinvert.linalg import Function
from fxinvert.rules.affine import channels, invert_affine
from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule
from fxinvert.rules.windows import Sliding, each, sliding


def average(key: str, spatial: int) -> Rule:
    """A rule for averages over windows: one small system, the same for every channel."""

    def invert(op: Op, target: Tensor) -> Inverse:
        anchor = op.anchor
        one_channel = (1, *anchor.shape[anchor.dim() - spatial :])
        return invert_affine(
            op, target, lambda: Function(op.evaluate, one_channel, anchor), channels(spatial)
        )

    return Rule(key, invert, Kind.AFFINE)


def maximum(key: str, spatial: int) -> Rule:
    """A rule for maxima over windows."""

    def invert(op: Op, target: Tensor) -> Inverse:
        return invert_maximum(op, target, sliding(each(op.attributes["kernel_size"], spatial), op.attributes))

    return Rule(key, invert, Kind.CLOSED_FORM)


def invert_maximum(op: Op, target: Tensor, window: Sliding) -> Inverse:
    """Nearest input whose window maxima are the target.

    No entry may exceed the targets of the windows that it lies in (its cap), and every window needs one entry that is
    its target. So entries above their cap come down to it, and every window still without its maximum raises one
    entry whose cap is its target: the one that is cheapest for the number of windows that it serves. For disjoint
    windows that is the nearest point; for overlapping ones the target is reached wherever it can be, and the choice
    of the raised entry is greedy (choosing best is a set cover). A window whose every entry is capped below its
    target by a neighbour gets the largest value it can have; a map that this brings no closer to its target than it
    was stays as it was.
    """
    anchor = op.anchor
    n = len(window.kernel)
    size, out = anchor.shape[-n:], target.shape[-n:]
    x, t = anchor.reshape(-1, size.numel()), target.reshape(-1, out.numel())
    index = torch.arange(size.numel(), device=anchor.device).reshape(1, 1, *size)
    index = window.unfold(index, out, fill=-1).reshape(out.numel(), -1)
    inside = index >= 0
    index = index.clamp(min=0)

    def spread(values: Tensor, reduce: str, start: float) -> Tensor:
        """Combines values of window entries `(rows, positions, entries)` into those of the inputs."""
        result = torch.full_like(x, start)
        flat = torch.where(inside, values, start).flatten(1)
        return result.scatter_reduce(1, index.flatten().expand(len(x), -1), flat, reduce)

    def entries(values: Tensor) -> Tensor:
        return values[:, index]

    ceiling = spread(t[..., None].expand(*t.shape, index.shape[1]), "amin", torch.inf)
    lowered = torch.minimum(x, ceiling)
    attained = torch.where(inside, entries(lowered), -torch.inf).amax(-1, keepdim=True)
    reachable = torch.where(inside, entries(ceiling), -torch.inf).amax(-1, keepdim=True)
    goal = torch.minimum(t[..., None], reachable)
    lacking = (attained < goal) & inside
    eligible = lacking & (entries(ceiling) == goal)
    served = spread(eligible.to(x.dtype), "sum", 0.0)
    cost = (ceiling - lowered).square() / served.clamp(min=1)
    choice = torch.where(eligible, entries(cost), torch.inf).argmin(-1, keepdim=True)
    chosen = torch.zeros_like(eligible).scatter(-1, choice, True) & eligible
    raised = spread(chosen.to(x.dtype), "amax", 0.0) > 0
    value = torch.where(raised, ceiling, lowered)
    unattained = (goal < t[..., None]).flatten(1)
    if bool(unattained.any()):
        reached = op(value.reshape(anchor.shape)).reshape(t.shape)
        farther = row_norms(reached - t) > row_norms(op.output.reshape(t.shape) - t)
        value = torch.where(farther[:, None], x, value)
    value = value.reshape(anchor.shape)
    missed = int(unattained.sum())
    residual = relative(op(value) - target, target)
    certificate = Certificate(
        status=Status.PROJECTED if missed else Status.NEAREST if window.disjoint else Status.EXACT,
        residual=residual,
        distance=row_norms(value - anchor),
        failed=torch.zeros_like(residual, dtype=torch.bool),
        projected=missed,
    )
    return Inverse(value, certificate)


def rules() -> list[Rule]:
    return [
        average("avg_pool1d", 1),
        average("avg_pool2d", 2),
        average("avg_pool3d", 3),
        average("adaptive_avg_pool1d", 1),
        average("adaptive_avg_pool2d", 2),
        average("adaptive_avg_pool3d", 3),
        maximum("max_pool1d", 1),
        maximum("max_pool2d", 2),
        maximum("max_pool3d", 3),
    ]
