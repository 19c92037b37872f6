"""Closed-form training of the affine ops of a segment: one pass of sums over the data, one linear solve per op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxinvert.errors import REPORT, SolveError
from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.passes.capture import attribute, evaluating
from fxinvert.passes.synthesize import parameters_of
from fxinvert.training.data import Batch
from fxinvert.training.statistics import NormalEquations, Solved

#: one op, or several that share their parameters
Sums = dict[str, NormalEquations]
Map = Callable[[Callable[[Batch], Sums], Iterable[Batch]], Iterable[Sums]]


@dataclass(frozen=True)
class Update:
    """The change of one op's parameters.

    Attributes:
        op: the path of the op.
        changes: ΔΘ by parameter name.
        solved: how it was found.
    """

    op: str
    changes: dict[str, Tensor]
    solved: Solved


def update_ops(
    inverse: InverseGraph,
    nodes: Sequence[fx.Node],
    batches: Iterable[Batch],
    *,
    dampings: Sequence[float],
    satisfied_weight: float,
    run: Map = map,
) -> list[list[Update]]:
    """The closed-form updates of some ops, all from the same pass over the data; for each damping one list of them.

    Args:
        inverse: gives the targets, with the parameters as they are now.
        nodes: the ops to train.
        batches: training data.
        dampings: values of ρ, relative to the mean of the Gram matrix's diagonal.
        satisfied_weight: weight of the samples whose output is its own target, the others weigh 1.
        run: how a function is applied to the batches, in order; the executor's.

    Raises:
        SolveError: the sums are not finite.
    """
    total: Sums = {}
    representatives = {_owner(node): node for node in reversed(nodes)}

    def sums(batch: Batch) -> Sums:
        return batch_sums(inverse, nodes, batch, satisfied_weight)

    with torch.no_grad(), evaluating(inverse.graph):
        for part in run(sums, batches):
            total = {key: total[key] + value if key in total else value for key, value in part.items()}
        return [
            [_updated(inverse, representatives[key], equations, damping) for key, equations in total.items()]
            for damping in dampings
        ]


def batch_sums(
    inverse: InverseGraph, nodes: Sequence[fx.Node], batch: Batch, satisfied_weight: float
) -> Sums:
    """G and C of every op, over one batch, by the name of the op's weight; ops that share a weight are added."""
    values = inverse.forward(batch.inputs)
    last = inverse.output_node
    targets = inverse.targets(values, batch.labels, [*nodes, last])
    moved = (targets[last] != values[last]).reshape(len(batch), -1).any(1)
    weights = torch.where(moved, 1.0, satisfied_weight).to(values[last].dtype)
    total: Sums = {}
    for node in nodes:
        op, trainable = inverse.op(node, values), inverse.inverse_op(node).rule.trainable
        assert trainable is not None, f"{node.name} cannot be trained. {REPORT}"
        errors = trainable.outputs(op, targets[node] - values[node])
        part = NormalEquations.of(trainable.features(op), errors, weights)
        key = _owner(node)
        total[key] = total[key] + part if key in total else part
    return total


def _updated(inverse: InverseGraph, node: fx.Node, equations: NormalEquations, damping: float) -> Update:
    path = node.meta["path"]
    if not bool(torch.isfinite(equations.gram).all() & torch.isfinite(equations.cross).all()):
        raise SolveError(f"the statistics of {path!r} are not finite: its inputs or targets overflow")
    solved = equations.solve(damping)
    trainable = inverse.inverse_op(node).rule.trainable
    assert trainable is not None
    names = parameters_of(node)
    parameters = {argument: attribute(inverse.graph, name) for argument, name in names.items()}
    changes = trainable.changes(parameters, solved.change)
    return Update(path, {names[argument]: change for argument, change in changes.items()}, solved)


def _owner(node: fx.Node) -> str:
    """The name of the op's first parameter: ops with the same one are trained as one."""
    return next(iter(parameters_of(node).values()))
