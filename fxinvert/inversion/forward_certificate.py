"""Certificates of targets that were not found op by op: by running the rest of the model from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.inversion.attainable import Bound, attainable
from fxinvert.inversion.rest import Rest
from fxinvert.inversion.stationary import REACH, first_order_error
from fxinvert.inversion.stepping import TOLERANCE
from fxinvert.passes.capture import evaluating
from fxinvert.passes.flow import by_sample
from fxinvert.rules import Certificate, Status
from fxinvert.rules.certificate import relative, row_norms


def certified_forward(
    graph: fx.GraphModule,
    targets: Mapping[fx.Node, Tensor],
    values: Mapping[fx.Node, Any],
    goal: Tensor,
    damping: float,
    refined: bool,
) -> dict[str, Certificate]:
    """The certificates of targets, by path, each measured when somebody looks.

    Running the rest of the model from every node costs as much as the square of the depth.

    Args:
        graph: the normalized graph.
        targets: of its nodes.
        values: of its forward pass.
        goal: the target of the output.
        damping: that the targets were found with.
        refined: whether they were to reach the goal, so that what misses it needs a reason.
    """
    # what others may change before somebody looks
    state = [*graph.parameters(), *graph.buffers()]
    state += [values[n] for n in graph.graph.find_nodes(op="placeholder")]

    @cache
    def bound() -> Bound | None:
        return attainable(graph, values, goal)

    def later(node: fx.Node, value: Tensor) -> Certificate:
        def measure() -> Certificate:
            with evaluating(graph):
                return _measured(Rest(graph, values, node), value, goal, damping, bound if refined else None)

        return Certificate.later(measure, value, goal, values[node], *state)

    return {node.meta["path"]: later(node, value) for node, value in targets.items()}


def _measured(
    rest: Rest, value: Tensor, goal: Tensor, damping: float, bound: Callable[[], Bound | None] | None
) -> Certificate:
    wanted = by_sample(rest.exit, goal)
    residual = relative(rest(value) - wanted, wanted)
    failed = ~torch.isfinite(residual)
    missed = (residual > TOLERANCE) & ~failed
    status = Status.DAMPED if bool(missed.any()) else Status.EXACT
    return Certificate(
        status=Status.FAILED if bool(failed.any()) else status,
        residual=residual,
        distance=row_norms(by_sample(rest.node, value - rest.values[rest.node])),
        failed=failed,
        damping=damping,
        reason=_reason(rest, value, wanted, residual, missed, bound())
        if bound and bool(missed.any())
        else "",
    )


def _reason(
    rest: Rest, value: Tensor, wanted: Tensor, residual: Tensor, missed: Tensor, bound: Bound | None
) -> str:
    """Why samples miss: their target is out of reach, proven or to first order, or the steps came to an end before."""
    count = int(missed.sum())
    proven = torch.zeros_like(missed) if bound is None else missed & bound.forbids(rest)
    stationary, least = torch.zeros_like(missed), torch.zeros_like(residual)
    rows = (missed & ~proven).nonzero()[:, 0]
    if len(rows):
        least[rows] = first_order_error(rest.of(rows), by_sample(rest.node, value)[rows], wanted[rows])
        stationary = least > TOLERANCE
    reasons = []
    if bound is not None and bool(proven.any()):
        reasons.append(
            f"{int(proven.sum())} of {count} targets that are missed lie beyond the range of {bound.node.meta['path']!r} "
            f"({bound.node.meta['op']}): no value before it comes nearer than up to {float(bound.least[proven].max()):.1e}"
        )
    if bool(stationary.any()):
        reasons.append(
            f"{int(stationary.sum())} of {count} are approached to {float(residual[stationary].max()):.1e} at worst and "
            f"stationary there: to first order, corrections of up to {REACH:.0%} of the value leave {float(least.max()):.1e}"
        )
    others = missed & ~proven & ~stationary
    if bool(others.any()):
        worst = float(residual[others].max())
        reasons.append(f"{int(others.sum())} are approached to {worst:.1e} at worst: more steps may help")
    return "; ".join(reasons)
