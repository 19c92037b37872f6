"""Walk: the inverse graph, followed no further than to the targets that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from fxinvert.errors import NoRuleError
from fxinvert.passes.capture import attribute
from fxinvert.passes.synthesize import ANCHOR_OF, renew


class Walk:
    """How targets are computed from the output's.

    Args:
        inverse: the inverse graph.
        forward: the graph that it was synthesized from.
    """

    def __init__(self, inverse: fx.GraphModule, forward: fx.GraphModule) -> None:
        self.inverse, self.forward = inverse, forward
        by_name = {node.name: node for node in forward.graph.nodes}
        self._start, *rest = inverse.graph.find_nodes(op="placeholder")
        self._anchored = {node: by_name[node.meta[ANCHOR_OF]] for node in rest}
        (output,) = inverse.graph.find_nodes(op="output")
        self._ends: dict[str, fx.Node] = dict(output.args[0][0])
        self._steps: dict[tuple[fx.Node, ...], list[fx.Node]] = {}

    def anchors(self, values: Mapping[fx.Node, Any]) -> list[Any]:
        """What the inverse graph takes after the output target; it reads the parameters that the forward graph has now."""
        renew(self.inverse, self.forward)
        return [values[node] for node in self._anchored.values()]

    def targets(
        self, target: Tensor, values: Mapping[fx.Node, Any], nodes: Sequence[fx.Node]
    ) -> dict[fx.Node, Tensor]:
        """The targets of forward nodes, given the output's and the values of a forward pass.

        Raises:
            NoRuleError: one of the nodes does not lie between input and output, so that it has no target.
        """
        for node in nodes:
            if node.meta["path"] not in self._ends:
                raise NoRuleError(
                    f"{node.meta['path']!r} does not lie on the way from the input to the output"
                )
        ends = tuple(self._ends[node.meta["path"]] for node in nodes)
        if ends not in self._steps:
            self._steps[ends] = self._leading_to(ends)
        env = {self._start: target, **dict(zip(self._anchored, self.anchors(values), strict=True))}
        for step in self._steps[ends]:
            env[step] = self._evaluated(step, env)
        return {node: env[end] for node, end in zip(nodes, ends, strict=True)}

    def _leading_to(self, ends: Iterable[fx.Node]) -> list[fx.Node]:
        """The steps that some values are computed by, in order."""
        found, waiting = set(ends), list(ends)
        while waiting:
            new = [n for n in waiting.pop().all_input_nodes if n not in found]
            found.update(new)
            waiting += new
        return [n for n in self.inverse.graph.nodes if n in found and n.op != "placeholder"]

    def _evaluated(self, step: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if step.op == "get_attr":
            return attribute(self.inverse, str(step.target))
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), env.__getitem__)
        called = self.inverse.get_submodule(str(step.target)) if step.op == "call_module" else step.target
        return called(*args, **kwargs)  # type: ignore[operator]

    def __reduce__(self) -> tuple[Any, ...]:
        return Walk, (self.inverse, self.forward)  # the nodes of a copy are others
