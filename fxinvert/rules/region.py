"""Regions: single-entry single-exit pieces of the graph, inverted as a whole.

A region that gives the shape it takes is often near the identity, x + F(x) as in residual networks: an accelerated
iteration reaches the target by a few evaluations, and where the region is far from the identity conjugate gradients do
(`fxinvert.linalg.fixed_point`). What they do not reach is left to the matrix-free fallback, from the anchor, sample by
sample. A reached target is claimed to be `EXACT`: the solution is the only one near the anchor wherever the Jacobian is
regular, but nothing here shows that it is.

A region in which every value goes its own way, an activation that was written out as x · sigmoid(x), is inverted value by
value, on all of its branches (`fxinvert.linalg.scalar`).

Where a ReLU follows, as after the addition of a residual block, its rule has inverted it exactly, and any value up to 0
does for a target up to 0: only what is to be positive, or is, binds the region. A value that is to be positive keeps its
slope below 0, so that it can get there. Where the target is out of reach all the same, that would cost more than it
gains, and the region is judged by what the ReLU makes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.linalg.fixed_point import FixedPoint, fixed_point
from fxinvert.linalg.scalar import roots
from fxinvert.linalg.vectors import flat, norm, per_sample
from fxinvert.rules.certificate import Certificate, Inverse, Status, reached, relative, row_norms
from fxinvert.rules.fallback import TOLERANCES, invert_matrix_free
from fxinvert.rules.op import Op

#: the key of a region, which no op has
REGION = "region"
#: ops of several values in one place
ARITHMETIC = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "addcmul", "addcdiv", "lerp", "where"}
    | {"maximum", "minimum", "fmax", "fmin", "logaddexp", "hypot"}
)
#: pairs of products with the Jacobian and its transpose, for every sample that the iteration leaves
PRODUCTS = 60
#: part of its error that a step must take off there, or it is a sample's last: where a target is out of reach, steps go on and on
WORTHWHILE = 3e-3
#: relative error before a ReLU that is worth no more steps, unless these are fast
ENOUGH = 1e-3


def invert_region(op: Op, target: Tensor) -> Inverse:
    """Nearest of the inputs that come closest to `target`, or an input near the anchor that reaches it.

    Args:
        op: the region.
        target: `(B, …)`.

    Raises:
        NoRuleError: the region cannot be differentiated, or does not keep samples apart.
    """
    settings = dataclasses.replace(op.settings, max_iterations=min(op.settings.max_iterations, PRODUCTS))
    op = dataclasses.replace(op, settings=settings)
    if op.attributes.get("entrywise"):
        return _by_value(op, target)
    if op.attributes.get("hinged"):
        return _before_relu(op, target)
    if op.anchor.shape != op.output.shape:
        return invert_matrix_free(op, target, worthwhile=WORTHWHILE)
    return _near_identity(op, target)


def _by_value(op: Op, target: Tensor) -> Inverse:
    """A root for every value, or the closest that the function comes."""
    found = roots(*_working(op, target))
    value = found.value.to(op.anchor.dtype)
    certificate = _certificate(op, target, value, found.evaluations)
    if certificate.status is Status.DAMPED and bool(found.closest.all()):
        certificate = dataclasses.replace(certificate, status=Status.LEAST_SQUARES)
    return Inverse(value, certificate)


def _working(op: Op, target: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """The region as a function in single precision at least; its anchor, its output and its target in that."""
    own = op.anchor.dtype
    working = torch.promote_types(own, torch.float32)
    anchor, output, wanted = (value.to(working) for value in (op.anchor, op.output, target))
    return lambda x: op(x.to(own)).to(working), anchor, output, wanted


def _iterated(
    op: Op,
    target: Tensor,
    *,
    enough: float = 0.0,
    closest: bool = False,
    stretch: Tensor | None = None,
) -> tuple[FixedPoint, Tensor]:
    """What the iteration finds, and the samples that have arrived."""
    own = op.anchor.dtype
    function, anchor, output, wanted = _working(op, target)
    size = norm(wanted)
    tolerance = TOLERANCES.get(own, torch.finfo(own).eps ** 0.5)
    size = torch.where(size > 0, size, 1)
    goal, satisfied = tolerance * size, max(tolerance, enough) * size

    found = fixed_point(
        function, anchor, output, wanted, goal, enough=satisfied, closest=closest, stretch=stretch
    )
    return found, found.error <= satisfied


def _near_identity(op: Op, target: Tensor) -> Inverse:
    """By the iteration as far as it gets; the other samples by the fallback, these held still."""
    found, arrived = _iterated(op, target)
    value = found.value.to(op.anchor.dtype)
    if bool(arrived.all()):
        return Inverse(value, _certificate(op, target, value, int(found.evaluations.max())))
    moved = flat(found.value != op.anchor).any(1)
    asked = torch.where(per_sample(arrived, target), op.output, target)
    rest = invert_matrix_free(op, asked, worthwhile=WORTHWHILE)
    solved = moved & arrived
    value = torch.where(per_sample(solved, target), value, rest.target)
    status = rest.certificate.status
    if bool(solved.any()) and status is Status.NEAREST:
        status = Status.EXACT
    certificate = dataclasses.replace(
        rest.certificate,
        status=status,
        residual=relative(op(value) - target, target),
        distance=row_norms(value - op.anchor),
    )
    return Inverse(value, certificate)


def _before_relu(op: Op, target: Tensor) -> Inverse:
    """Where nothing below 0 matters: by the iteration, and what does not arrive again, as the ReLU sees it."""
    live, target = target > 0, target.relu()

    def bound(x: Tensor) -> Tensor:
        # `live` values keep their slope below 0; a product is several times faster to differentiate than a choice
        y = op(x)
        return y * (live | (y.detach() > 0)).to(y.dtype)

    def seen(x: Tensor) -> Tensor:
        return op(x).relu()

    sought = dataclasses.replace(op, evaluate=bound, output=torch.where(live, op.output, op.output.relu()))
    judged = dataclasses.replace(op, evaluate=seen, output=op.output.relu())
    found, arrived = _iterated(sought, target, enough=ENOUGH)
    value, evaluations = found.value.to(op.anchor.dtype), int(found.evaluations.max())
    if not bool(arrived.all()):
        # what has arrived is held still
        asked = torch.where(per_sample(arrived, target), judged.output, target)
        other, _ = _iterated(judged, asked, closest=True, stretch=found.stretch)
        errors = [norm(judged(v) - target) for v in (value, other.value.to(value.dtype))]
        better = ~arrived & (errors[1] < errors[0])
        value = torch.where(per_sample(better, value), other.value.to(value.dtype), value)
        evaluations += int(other.evaluations.max())
    return Inverse(value, _certificate(judged, target, value, evaluations))


def _certificate(op: Op, target: Tensor, value: Tensor, evaluations: int) -> Certificate:
    """What was reached; nothing had to be solved where the target is the output."""
    residual = relative(op(value) - target, target)
    arrived = Status.EXACT if evaluations else Status.NEAREST
    return Certificate(
        status=arrived if reached(residual, op.anchor.dtype) else Status.DAMPED,
        residual=residual,
        distance=row_norms(value - op.anchor),
        failed=torch.zeros_like(residual, dtype=torch.bool),
        iterations=evaluations,
    )
