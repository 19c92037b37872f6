"""Regions: single-entry single-exit pieces of the graph, inverted as a whole.

A region that gives the shape it takes is often near the identity, x + F(x) as in residual networks: a fixed-point
iteration reaches the target by a few evaluations (`fxinvert.linalg.fixed_point`). What it does not reach is left to the
matrix-free fallback, from the anchor, sample by sample. A reached target is claimed to be `EXACT`: the solution is the
only one near the anchor wherever the Jacobian is regular, but nothing here shows that it is.

Where a ReLU follows, as after the addition of a residual block, its rule has inverted it exactly, and any value up to 0
does for a target up to 0: only what is to be positive, or is, binds the region.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxinvert.linalg.fixed_point import fixed_point
from fxinvert.linalg.vectors import by_sample, flat
from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.fallback import TOLERANCES, invert_matrix_free
from fxinvert.rules.op import Op

#: the key of a region, which no op has
REGION = "region"
#: pairs of products with the Jacobian and its transpose, for every sample that the fixed-point iteration leaves
PRODUCTS = 60


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
    if op.attributes.get("hinged"):
        op, target = _hinged(op, target)
    if op.anchor.shape != op.output.shape:
        return invert_matrix_free(op, target)
    return _near_identity(op, target)


def _hinged(op: Op, target: Tensor) -> tuple[Op, Tensor]:
    """The region and its target where nothing below 0 matters; a value that is to be positive keeps its slope below."""
    live = target > 0

    def evaluate(x: Tensor) -> Tensor:
        output = op(x)
        return torch.where(live, output, output.relu())

    output = torch.where(live, op.output, op.output.relu())
    return dataclasses.replace(op, evaluate=evaluate, output=output), target.relu()


def _near_identity(op: Op, target: Tensor) -> Inverse:
    """By the fixed-point iteration as far as it gets; the other samples by the fallback, these held still."""
    own = op.anchor.dtype
    working = torch.promote_types(own, torch.float32)
    anchor, output, wanted = (value.to(working) for value in (op.anchor, op.output, target))
    size = row_norms(wanted)
    tolerance = TOLERANCES.get(own, torch.finfo(own).eps ** 0.5)
    goal = tolerance * torch.where(size > 0, size, 1)
    found = fixed_point(lambda x: op(x.to(own)).to(working), anchor, output, wanted, goal)
    moved, arrived = flat(found.value != anchor).any(1), found.error <= goal
    if bool(arrived.all()):
        value = found.value.to(own)
        return Inverse(value, _certificate(op, target, value, int(found.evaluations.max())))
    rest = invert_matrix_free(op, torch.where(by_sample(arrived, target), op.output, target))
    solved = moved & arrived
    value = torch.where(by_sample(solved, target), found.value.to(own), rest.target)
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


def _certificate(op: Op, target: Tensor, value: Tensor, evaluations: int) -> Certificate:
    """Of a batch that has arrived; nothing had to be solved where the target is the output."""
    residual = relative(op(value) - target, target)
    return Certificate(
        status=Status.EXACT if evaluations else Status.NEAREST,
        residual=residual,
        distance=row_norms(value - op.anchor),
        failed=torch.zeros_like(residual, dtype=torch.bool),
        iterations=evaluations,
    )
