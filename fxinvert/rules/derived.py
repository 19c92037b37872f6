"""Ops that are another op, of an input or a target that was changed first: one line per op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules import arithmetic, simplex
from fxinvert.rules.branches import MARGIN, Branch
from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.elementwise import INF, Branches, clipped, elementwise, even
from fxinvert.rules.entrywise import invert_branches
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.functions import operand, power
from fxinvert.rules.groups import along, settled
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule


def quotient(op: Op, target: Tensor) -> Inverse:
    """x / c is a product with 1/c, and c / x is 1/x, of the target divided by c; zeros of c leave x where it is."""
    if op.attributes.get("rounding_mode"):
        raise NoRuleError(
            f"node {op.name!r}, {op.key}: it rounds its quotient, whose values do not follow the input; put it into a "
            "function of its own and give that function a rule with @fxinvert.inverse_rule"
        )
    if "other" not in op.anchors:
        return arithmetic.scaled(op.key, lambda op: 1 / arithmetic.constant(op)).invert(op, target)  # type: ignore[return-value]
    return _divided(op, target, arithmetic.given(op, "self"), 0)


def added_quotient(op: Op, target: Tensor) -> Inverse:
    """self + value · tensor1 / tensor2: affine in the first two, a quotient in the third."""
    value = float(op.attributes["value"])
    if "tensor2" in op.anchors:
        return _divided(op, target, value * op.parameters["tensor1"], op.parameters["self"])
    gain: Callable[[Op], Tensor | float] = (
        (lambda op: 1) if arithmetic.first(op) else (lambda op: value / op.parameters["tensor2"])
    )
    return arithmetic.scaled(op.key, gain).invert(op, target)  # type: ignore[return-value]


def _divided(op: Op, target: Tensor, dividend: Tensor | float, offset: Tensor | float) -> Inverse:
    """Nearest x for y = offset + dividend / x."""
    anchor = op.anchor
    if anchor.shape != target.shape:
        return invert_matrix_free(op, target)
    working = torch.promote_types(anchor.dtype, torch.float32)
    c = torch.as_tensor(dividend, dtype=working, device=anchor.device).expand_as(anchor)
    inverse = anchor.to(working).reciprocal()
    plain = replace(
        op, output=inverse, parameters={}, evaluate=lambda x: x.to(working).reciprocal().to(x.dtype)
    )
    # where the target is the output, so it must be after the division
    moves = (c != 0) & (target != op.output)
    asked = (target - offset) / torch.where(c == 0, 1, c)
    found = invert_branches(plain, torch.where(moves, asked, inverse), power(-1))
    return as_found(op, target, torch.where(moves, found.target, anchor), found.certificate)


def as_found(op: Op, target: Tensor, value: Tensor, certificate: Certificate) -> Inverse:
    """The answer with the certificate of the problem that it was found by, its residual that of the op itself."""
    residual = relative(op(value) - target, target)
    reached = bool((residual <= torch.finfo(target.dtype).eps ** 0.5).all())
    status = (
        Status.NEAREST if reached else max(certificate.status, Status.LEAST_SQUARES, key=lambda s: s.severity)
    )
    return Inverse(
        value, replace(certificate, status=status, residual=residual, distance=row_norms(value - op.anchor))
    )


def softmin(op: Op, target: Tensor) -> Inverse:
    """softmin x = softmax −x."""
    turned = replace(op, anchors={"self": -op.anchor}, evaluate=lambda x: op(-x))
    found = simplex.softmax(turned, target)
    return Inverse(-found.target, found.certificate)


def longer_side(c: Tensor) -> Branches:
    """√(x² + c²), for a c that broadcasts."""
    least = c.abs()
    return even(lambda y: ((y - least) * (y + least)).clamp(min=0).sqrt(), least)


def soft_maximum(c: Tensor) -> Branches:
    """log(eˣ + eᶜ), for a c that broadcasts: increasing, from c on, which is only approached."""
    least = c + MARGIN * (1 + c.abs())
    return (Branch(-INF, INF, least, INF, lambda y, anchor: y + (-torch.expm1(c - y)).log()),)


def extreme(key: str, sign: int) -> Rule:
    """A rule for the larger (`sign` 1) or the smaller (−1) of two."""

    def branches(a: Mapping[str, Any]) -> Branches:
        return clipped(operand(a), INF) if sign > 0 else clipped(-INF, operand(a))

    entrywise = elementwise(key, branches)

    def invert(op: Op, target: Tensor) -> Inverse:
        """The target where it lies on the right side of the other operand; one that is spread comes closest to all."""
        anchor = op.anchor
        if anchor.shape == target.shape:
            return entrywise.invert(op, target)  # type: ignore[return-value]
        spread = [i for i in range(anchor.dim()) if anchor.shape[i] != target.shape[i]]
        if anchor.dim() != target.dim() or spread[0] == 0:
            return invert_matrix_free(op, target)
        groups = along(spread)
        working = torch.promote_types(anchor.dtype, torch.float32)
        x, c, t = (
            sign * groups.split(value.to(working))
            for value in (anchor, operand(op.parameters).expand_as(target), target)
        )
        return settled(op, target, sign * nearest_spread(x, c, t), groups, groups)

    return Rule(key, invert, Kind.ELEMENTWISE)


def nearest_spread(x: Tensor, c: Tensor, t: Tensor) -> Tensor:
    """The number z nearest x, `(…, 1)`, among the minimizers of Σ (max(z, cᵢ) − tᵢ)², for c and t `(…, n)`.

    Between two neighbours of the sorted c the sum is a parabola, so there are n + 1 candidates to compare.
    """
    c, order = c.sort(-1)
    t = t.gather(-1, order)
    count = torch.arange(1, c.shape[-1] + 1, device=c.device)
    means = t.cumsum(-1) / count
    ends = torch.cat([c[..., 1:], torch.full_like(c[..., :1], INF)], -1)
    candidates = torch.cat([torch.minimum(x, c[..., :1]), torch.minimum(torch.maximum(means, c), ends)], -1)
    errors = (torch.maximum(candidates[..., None], c[..., None, :]) - t[..., None, :]).square().sum(-1)
    best = errors <= errors.amin(-1, keepdim=True) * (1 + 4 * torch.finfo(c.dtype).eps)
    away = torch.where(best, (candidates - x).abs(), INF)
    return candidates.gather(-1, away.argmin(-1, keepdim=True))


def rules() -> list[Rule]:
    return [
        Rule("div", quotient, Kind.AFFINE),
        Rule("addcdiv", added_quotient, Kind.AFFINE),
        Rule("softmin", softmin, Kind.CLOSED_FORM),
        *[extreme(key, 1) for key in ("maximum", "max", "fmax")],
        *[extreme(key, -1) for key in ("minimum", "min", "fmin")],
        elementwise("logaddexp", lambda a: soft_maximum(operand(a))),
        elementwise("hypot", lambda a: longer_side(operand(a))),
    ]
