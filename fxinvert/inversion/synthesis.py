"""Synthesis: the inverse graph of a forward graph, made when it is first needed.

Training may not need it: the last layer is fitted to the output's own target, and where the graph branches all targets come from the
output's derivative.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from torch import fx

from fxinvert.inversion.walk import Walk
from fxinvert.linalg import SolveSettings
from fxinvert.passes.flow import Flow, Stretch
from fxinvert.passes.inverse_op import InverseOp
from fxinvert.passes.synthesize import TARGET_OF, solved_systems, synthesize
from fxinvert.rules import RuleSet


class Synthesis:
    """Of one forward graph, by some rules.

    Args:
        graph: the normalized forward graph.
        rules: the rules in force.
        settings: how linear systems are solved.
    """

    def __init__(self, graph: fx.GraphModule, rules: RuleSet, settings: SolveSettings) -> None:
        self.graph, self.rules, self._given = graph, rules, settings

    @cached_property
    def settings(self) -> SolveSettings:
        """The settings, with how many ops share the memory."""
        return replace(self._given, sharing=max(1, len(solved_systems(Flow(self.graph), self.rules))))

    @cached_property
    def inverse(self) -> fx.GraphModule:
        """The inverse graph, which is walked; its code is not made.

        Raises:
            NoRuleError: an op on the way has no rule.
        """
        return synthesize(self.graph, self.rules, self.settings)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The inverse graph with its code, which runs as a whole."""
        self.inverse.recompile()
        return self.inverse

    @cached_property
    def walk(self) -> Walk:
        return Walk(self.inverse, self.graph)

    def op(self, stretch: Stretch) -> InverseOp:
        """What finds the target of a stretch's entry."""
        return self.inverse.get_submodule(self._names[stretch.entry.name])  # type: ignore[return-value]

    @cached_property
    def _names(self) -> dict[str, str]:
        calls = self.inverse.graph.find_nodes(op="call_module")
        return {node.meta[TARGET_OF]: str(node.target) for node in calls}
