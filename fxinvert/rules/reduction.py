"""Reductions: many entries, one value. One line per op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules.affine import Rows
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.groups import along, axes, per_group, settled
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.simplex import onto_log_simplex, onto_simplex

#: (entries `(…, n)`, their value and its target `(…, 1)`) -> the nearest entries that have the target
Nearest = Callable[[Tensor, Tensor, Tensor], Tensor]


def sum_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Σx = t: A Aᵀ = n, so every entry takes the same share of what is missing."""
    return x + (t - y) / x.shape[-1]


def mean_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Mean x = t: every entry moves by what is missing."""
    return x + (t - y)


def largest_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Max x = t: entries above it come down, and the largest, the first of equals, becomes the target."""
    return torch.where(_first(x == x.amax(-1, keepdim=True)), t, torch.minimum(x, t))


def smallest_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Min x = −max −x."""
    return -largest_to(-x, -y, -t)


def logsumexp_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """log Σeˣ = t: x − t lies on {log Σeᵘ = 0}."""
    return onto_log_simplex(x.double() - t.double())[0] + t


def length_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """‖x‖₂ = t: along the ray; from zero, where every direction is as near, all entries get the same."""
    size, t = torch.linalg.vector_norm(x, dim=-1, keepdim=True), t.clamp(min=0)
    even = (t / math.sqrt(x.shape[-1])).expand_as(x)
    return torch.where(size > 0, x * (t / torch.where(size > 0, size, 1)), even)


def absolute_sum_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """‖x‖₁ = t: less by the projection onto the scaled simplex (Duchi et al., ICML 2008), more by equal shares."""
    size, t = x.abs(), t.clamp(min=0)
    total = size.sum(-1, keepdim=True)
    less = onto_simplex(size, t)
    return _signed(torch.where(t < total, less, size + (t - total) / x.shape[-1]), x)


def largest_size_to(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """‖x‖∞ = t: the largest of the sizes."""
    return _signed(largest_to(x.abs(), y, t.clamp(min=0)), x)


def reduction(key: str, nearest: Nearest) -> Rule:
    """A rule for a reduction over `dim`, kept or not."""

    def invert(op: Op, target: Tensor) -> Inverse:
        return invert_reduction(op, target, nearest)

    return Rule(key, invert, Kind.CLOSED_FORM)


def norm(key: str, order: str) -> Rule:
    """A rule for a vector norm whose order is the argument `order`."""

    def invert(op: Op, target: Tensor) -> Inverse:
        p = op.attributes.get(order)
        kinds: dict[float, Nearest] = {1: absolute_sum_to, 2: length_to, math.inf: largest_size_to}
        dim = op.attributes.get("dim")
        matrix = key == "linalg_norm" and p is not None and isinstance(dim, Sequence) and len(dim) == 2
        p = 2 if p in (None, "fro") else p
        if matrix or p not in kinds:
            raise NoRuleError(
                f"node {op.name!r}, {op.key}: there is no closed form for the {'matrix ' if matrix else ''}norm of "
                f"order {p}; those of vectors of order 1, 2 and infinity have one"
            )
        return invert_reduction(op, target, kinds[p], least=0)

    return Rule(key, invert, Kind.CLOSED_FORM)


def invert_reduction(op: Op, target: Tensor, nearest: Nearest, least: float = -math.inf) -> Inverse:
    """The nearest entries with the target, group by group; `least` is the smallest value that the op can have."""
    dim = op.attributes["dim"] if "dim" in op.attributes else op.attributes.get("axis")
    entries = along(axes(op, dim))
    working = torch.promote_types(torch.promote_types(op.anchor.dtype, target.dtype), torch.float32)
    anchor = entries.split(op.anchor).to(working)
    single = Rows(lambda value: per_group(value, anchor), torch.Tensor.reshape_as)
    y, t = (single.split(value).to(working) for value in (op.output, target))
    return settled(op, target, nearest(anchor, y, t), entries, single, outside=t < least)


def _first(mask: Tensor) -> Tensor:
    """The first place along the last axis where the mask holds; argmax does not promise which."""
    return mask & (mask.cumsum(-1) == 1)


def _signed(size: Tensor, x: Tensor) -> Tensor:
    return torch.where(x < 0, -size, size)


def rules() -> list[Rule]:
    return [
        reduction("mean", mean_to),
        reduction("sum", sum_to),
        reduction("amax", largest_to),
        reduction("amin", smallest_to),
        reduction("logsumexp", logsumexp_to),
        norm("norm", "p"),
        norm("linalg_norm", "ord"),
        norm("linalg_vector_norm", "ord"),
    ]
