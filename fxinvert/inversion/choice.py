"""Which reconstruction, where the user does not say.

Node by node every op is factorized once, and each target then takes a solve; where an op is too large for that, a solve takes hundreds
of products. One linearization gives the targets of all values for a few forward passes, however large or branched the graph is.
Chains that are trained towards either end up about as good.
"""

from __future__ import annotations

from torch import fx

from fxinvert.inversion.inverse_graph import Reconstructed
from fxinvert.passes.flow import Flow
from fxinvert.passes.synthesize import solved_systems
from fxinvert.rules import RuleSet
from fxinvert.rules.registry import in_force

#: numbers on the smaller side of a linear system that is solved for a chain
LARGEST = 8192


def reconstruction_for(graph: fx.GraphModule, rules: RuleSet | None = None) -> Reconstructed:
    """Node by node for chains of ops that are solved at once; linearized where an op is larger, or the graph branches.

    Args:
        graph: a normalized graph.
        rules: the rules in force; the default ones where none are given.

    Raises:
        NoRuleError: the output does not depend on the input.
    """
    flow = Flow(graph)
    if flow.branches or max(solved_systems(flow, in_force(rules)), default=0) > LARGEST:
        return "linearized"
    return "nodewise"
