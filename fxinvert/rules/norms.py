"""Lengths, angles and spreads of groups of entries, in closed form: one line per op.

The inputs with one and the same value are spheres, rays and cones; the nearest of them lies in the plane of the anchor.
A ray ends at zero, where its direction is lost: an answer keeps MARGIN of the anchor's length (or ε, if that is more).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.errors import NoRuleError
from fxinvert.rules.affine import Rows
from fxinvert.rules.branches import MARGIN
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.groups import along, axes, settled
from fxinvert.rules.op import Op
from fxinvert.rules.pooling import channelwise
from fxinvert.rules.reduction import (
    Nearest,
    absolute_sum_to,
    invert_reduction,
    largest_size_to,
    length_to,
)
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.windows import Sliding, each, sliding

#: the nearest entries with a norm, by its order
WITH_NORM: dict[float, Nearest] = {1: absolute_sum_to, 2: length_to, math.inf: largest_size_to}


def _length(value: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    return length


def _on_ray(x: Tensor, direction: Tensor, least: float) -> Tensor:
    """The point of the ray nearest x, no shorter than the margin; `direction` need not have length 1."""
    size = _length(direction)
    unit = direction / torch.where(size > 0, size, 1)
    reach = (x * unit).sum(-1, keepdim=True)
    return torch.maximum(reach, torch.maximum(MARGIN * _length(x), least * size)) * unit


def normalize(op: Op, target: Tensor) -> Inverse:
    """x / ‖x‖: the ray through the nearest point of the sphere, met where it comes closest to the anchor.

    Values inside the sphere belong to inputs shorter than ε, which tell nothing apart: they are projected outward.
    """
    p, eps = float(op.attributes["p"]), float(op.attributes["eps"])
    if p not in WITH_NORM:
        return invert_matrix_free(op, target)
    groups = along(axes(op, op.attributes["dim"]))
    working = torch.promote_types(op.anchor.dtype, torch.float32)
    x, t = (groups.split(value).to(working) for value in (op.anchor, target))
    size = torch.linalg.vector_norm(t, p, dim=-1, keepdim=True)
    value = _on_ray(x, WITH_NORM[p](t, size, torch.ones_like(size)), eps)
    return settled(op, target, value, groups, groups, outside=size != 1)


def cosine_similarity(op: Op, target: Tensor) -> Inverse:
    """⟨x, c⟩ / ‖x‖‖c‖: the cone around c with the angle that is asked for, met where it comes closest to the anchor."""
    (held,) = (value for name, value in op.parameters.items() if name in ("x1", "x2"))
    anchor, dim = op.anchor, op.attributes["dim"]
    if (anchor[:1] + held[:1]).shape[1:] != anchor.shape[1:]:
        return invert_matrix_free(op, target)
    groups = along(axes(op, dim))
    single = Rows(lambda value: value.unsqueeze(dim).movedim(dim, -1), torch.Tensor.reshape_as)
    working = torch.promote_types(anchor.dtype, torch.float32)
    x, c = (groups.split(value).to(working) for value in (anchor, held.expand_as(anchor)))
    wanted = single.split(target).to(working)
    cosine = wanted.clamp(-1, 1)
    axis = c / torch.where(_length(c) > 0, _length(c), 1)
    aside = _across(x - (x * axis).sum(-1, keepdim=True) * axis, axis)
    direction = cosine * axis + (1 - cosine.square()).clamp(min=0).sqrt() * aside
    value = torch.where(_length(c) > 0, _on_ray(x, direction, op.attributes["eps"]), x)
    return settled(op, target, value, groups, single, outside=wanted != cosine)


def _across(part: Tensor, axis: Tensor) -> Tensor:
    """The direction of what is left of x beside the axis; any one across the axis where nothing is."""
    first = F.one_hot(axis.abs().argmin(-1), axis.shape[-1]).to(axis)
    other = first - (first * axis).sum(-1, keepdim=True) * axis
    chosen = torch.where(_length(part) > 0, part, other)
    size = _length(chosen)
    return chosen / torch.where(size > 0, size, 1)


def spread(key: str, power: float) -> Rule:
    """A rule for the standard deviation (`power` 1) or the variance (2) over `dim`."""

    def invert(op: Op, target: Tensor) -> Inverse:
        """The deviations from the mean, scaled; the mean is the anchor's. From none, all get the same but for one."""
        given = op.attributes
        lost = given["correction"] if "correction" in given else int(given["unbiased"])
        lost = 1 if lost is None else lost

        def nearest(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            count = x.shape[-1] - lost
            if count <= 0:
                raise NoRuleError(
                    f"node {op.name!r}, {op.key}: it divides by {count}, the number of entries less the correction"
                )
            deviation = x - x.mean(-1, keepdim=True)
            even = torch.ones_like(x)
            even[..., 0] = 1.0 - x.shape[-1]
            deviation = torch.where(_length(deviation) > 0, deviation, even)
            goal = (t.clamp(min=0) ** (2 / power) * count).sqrt()
            return x.mean(-1, keepdim=True) + deviation * (goal / _length(deviation))

        return invert_reduction(op, target, nearest, least=0)

    return Rule(key, invert, Kind.CLOSED_FORM)


def power_average(key: str, spatial: int) -> Rule:
    """A rule for the p-norms of windows."""

    def invert(op: Op, target: Tensor) -> Inverse:
        """Windows that do not overlap have the nearest entries with their norm; a sum (p = 1) is affine."""
        given, p = op.attributes, float(op.attributes["norm_type"])
        kernel = each(given["kernel_size"], spatial)
        window = sliding(kernel, {"stride": given["stride"], "padding": 0})
        if p == 1:  # evaluated as torch does it, its slope at zero is lost
            return channelwise(replace(op, evaluate=_sums(op, kernel)), target, spatial)
        if p not in WITH_NORM or not window.disjoint or given["ceil_mode"]:
            return invert_matrix_free(op, target)
        groups = _windows(window, spatial)
        single = Rows(lambda value: value.unsqueeze(-1), torch.Tensor.reshape_as)
        working = torch.promote_types(op.anchor.dtype, torch.float32)
        x, (y, t) = (
            groups.split(op.anchor).to(working),
            (single.split(value).to(working) for value in (op.output, target)),
        )
        return settled(op, target, WITH_NORM[p](x, y, t), groups, single, outside=t < 0)

    return Rule(key, invert, Kind.CLOSED_FORM)


def _sums(op: Op, kernel: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The sums over windows."""
    average = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    stride, ceil = op.attributes["stride"], op.attributes["ceil_mode"]
    return lambda x: math.prod(kernel) * average(x, kernel, stride, ceil_mode=ceil)


def _windows(window: Sliding, spatial: int) -> Rows:
    """The windows of a map, `(B, C, *positions, entries)`; what lies between them stays as it is in the second tensor."""

    def join(value: Tensor, like: Tensor) -> Tensor:
        joined = like.to(value.dtype).clone()
        inside = window.unfold(joined)
        inside.copy_(value.reshape(inside.shape))
        return joined

    return Rows(lambda value: window.unfold(value).flatten(-spatial), join)


def rules() -> list[Rule]:
    return [
        Rule("normalize", normalize, Kind.CLOSED_FORM),
        Rule("cosine_similarity", cosine_similarity, Kind.CLOSED_FORM),
        spread("std", 1),
        spread("var", 2),
        power_average("lp_pool1d", 1),
        power_average("lp_pool2d", 2),
        power_average("lp_pool3d", 3),
    ]
