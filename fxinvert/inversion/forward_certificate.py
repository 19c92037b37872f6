"""Certificates of targets that were not found op by op: by running the rest of the model from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxinvert.inversion.attainable import Bound
from fxinvert.inversion.goal import Goal, Miss
from fxinvert.inversion.rest import Rest
from fxinvert.inversion.stationary import REACH, first_order_error
from fxinvert.inversion.stepping import TOLERANCE
from fxinvert.passes.capture import evaluating
from fxinvert.passes.flow import by_sample
from fxinvert.rules import Certificate, Status
from fxinvert.rules.certificate import row_norms


def certified_forward(
    graph: fx.GraphModule,
    targets: Mapping[fx.Node, Tensor],
    values: Mapping[fx.Node, Any],
    goal: Goal,
    damping: float,
    refined: bool,
    bound: Bound | None,
) -> dict[str, Certificate]:
    """The certificates of targets, by path, each measured when somebody looks.

    Running the rest of the model from every node costs as much as the square of the depth.

    Args:
        graph: the normalized graph.
        targets: of its nodes.
        values: of its forward pass.
        goal: the outputs that are right.
        damping: that the targets were found with.
        refined: whether they were to reach that, so that what misses it needs a reason.
        bound: what is proven of the goal.
    """
    # what others may change before somebody looks
    state = [*graph.parameters(), *graph.buffers()]
    state += [values[n] for n in graph.graph.find_nodes(op="placeholder")]
    state += [leaf for leaf in tree_leaves(goal.labels) if isinstance(leaf, Tensor)]

    def later(node: fx.Node, value: Tensor) -> Certificate:
        def measure() -> Certificate:
            with evaluating(graph):
                return _measured(Miss(Rest(graph, values, node), goal), value, damping, refined, bound)

        return Certificate.later(measure, value, goal.target, goal.outputs, values[node], *state)

    return {node.meta["path"]: later(node, value) for node, value in targets.items()}


def _measured(miss: Miss, value: Tensor, damping: float, refined: bool, bound: Bound | None) -> Certificate:
    rest = miss.rest
    residual = row_norms(miss(value))
    failed = ~torch.isfinite(residual)
    missed = (residual > TOLERANCE) & ~failed
    status = Status.DAMPED if bool(missed.any()) else Status.EXACT
    return Certificate(
        status=Status.FAILED if bool(failed.any()) else status,
        residual=residual,
        distance=row_norms(by_sample(rest.node, value - rest.values[rest.node])),
        failed=failed,
        damping=damping,
        reason=_reason(miss, value, residual, missed, bound) if refined else "",
    )


def _reason(miss: Miss, value: Tensor, residual: Tensor, missed: Tensor, bound: Bound | None) -> str:
    """Which samples are asked for less, and why others miss.

    What is right is out of reach, proven or to first order, or the steps came to an end before.
    """
    count = int(missed.sum())
    proven = torch.zeros_like(missed) if bound is None else missed & bound.forbids(miss.rest)
    stationary, least = torch.zeros_like(missed), torch.zeros_like(residual)
    rows = (missed & ~proven).nonzero()[:, 0]
    if len(rows):
        least[rows] = first_order_error(miss.of(rows), by_sample(miss.rest.node, value)[rows])
        stationary = least > TOLERANCE
    reasons = []
    eased = (miss.goal.share < 1) & ~(proven if bound is None else bound.proven)
    if bound is not None and bool(eased.any()):
        reasons.append(
            f"{int(eased.sum())} of {len(eased)} labels are to lead by {float(miss.goal.share[eased].min()):.0%} of the "
            f"margin at least: more is beyond the range of {bound.node.meta['path']!r} ({bound.node.meta['op']})"
        )
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
