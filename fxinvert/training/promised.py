"""What a `Trainable` promises of an op's parameters, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from fxinvert.errors import RuleError
from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.passes.capture import attribute
from fxinvert.passes.owned import trained_parameters
from fxinvert.rules import RuleSet
from fxinvert.training.computed import changes_of


@torch.no_grad()
def check_parameters(inverse: InverseGraph, x: Tensor, rules: RuleSet, tolerance: float) -> None:
    """Checks that a change ΔΘ of an op's parameters, if it is trained, changes its output, in rows, by Δy = ΔΘ ã.

    Args:
        inverse: of a graph of this one op, whose parameters are changed and put back.
        x: its input `(B, …)`.
        rules: the rules in force.
        tolerance: largest relative error.

    Raises:
        RuleError: it does not, or the op's `Trainable` gives what training cannot use.
    """
    graph, node, values = inverse.graph, inverse.output_node, inverse.forward(x)
    if not trained_parameters(node, rules):
        return
    op, trainable = inverse.op(node, values), inverse.trainable(node)
    features, rows = trainable.features(op), trainable.outputs(op, op.output)
    draw = torch.Generator().manual_seed(len(x))
    change = torch.randn(len(rows), rows.shape[2], features.shape[2], generator=draw).to(rows)
    changes = changes_of(inverse, node, change).changes
    before = {name: attribute(graph, name).clone() for name in changes}
    try:
        for name, value in changes.items():
            attribute(graph, name).add_(value)
        difference = trainable.outputs(op, graph(x) - op.output)
    finally:
        for name, value in before.items():
            attribute(graph, name).copy_(value)
    wanted = (features @ change.mT).double()
    error = float((difference - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if not error <= tolerance:
        rule = inverse.inverse_op(node).rule
        raise RuleError(
            f"the rule for {rule.key!r} ({rule.origin}): a change of the parameters does not change the output as its trainable says, "
            f"by features · changeᵀ: relative error {error:.3g}, at most {tolerance:.0e} is allowed. Is the matrix transposed, a "
            "row elsewhere, or the op not affine in its parameters?"
        )
