"""Reconstruction: what every node computed, and what it should have computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxinvert.errors import UnknownNameError
from fxinvert.inversion.goal import Goal
from fxinvert.inversion.replay import output_given
from fxinvert.notebook import table
from fxinvert.passes.capture import evaluating
from fxinvert.passes.flow import by_sample
from fxinvert.rules import Certificate
from fxinvert.rules.certificate import passed_through, relative, row_norms

V = TypeVar("V")


class ByName(Mapping[str, V]):
    """Values by node name: the module path (`"layer1.0.conv1"`) or the graph's own name (`"layer1_0_conv1"`)."""

    def __init__(self, values: Mapping[str, V], aliases: Mapping[str, str]) -> None:
        self._values, self._aliases = dict(values), aliases

    def __getitem__(self, name: str) -> V:
        known = name if name in self._values else self._aliases.get(name, name)
        if known not in self._values:
            close = difflib.get_close_matches(name, self._values, n=3, cutoff=0.4)
            raise UnknownNameError(
                f"no node {name!r}; did you mean {', '.join(close or list(self._values)[:3])}?"
            )
        return self._values[known]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"ByName({', '.join(self)})"


class Reconstruction:
    """What every node computed, and what it should have computed, for one batch.

    Attributes:
        names: the nodes between input and output, input first.
        anchors: what each node produced, `(B, …)`.
        targets: what it should have produced, `(B, …)`.
        certificates: how each target was found, from that of what follows; the output's is given.
        output_target: the target of the model's output.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        values: Mapping[fx.Node, Any],
        targets: Mapping[str, Tensor],
        certificates: Mapping[str, Certificate],
        goal: Goal,
    ) -> None:
        self._graph, self._values, self._goal = graph, values, goal
        nodes = [node for node in graph.graph.nodes if node.meta.get("path") in targets]
        aliases = {node.name: node.meta["path"] for node in nodes}
        self._nodes = {node.meta["path"]: node for node in nodes}
        self.names: list[str] = list(self._nodes)
        self.anchors: Mapping[str, Tensor] = ByName(
            {name: values[self._nodes[name]] for name in self.names}, aliases
        )
        self.targets: Mapping[str, Tensor] = ByName({name: targets[name] for name in self.names}, aliases)
        self.certificates: Mapping[str, Certificate] = ByName(
            {
                name: certificates.get(name) or passed_through(targets[name], self.anchors[name]).certificate
                for name in self.names
            },
            aliases,
        )
        self.output_target = self.targets[self.names[-1]]

    def consistency(self, name: str) -> Tensor:
        """Runs the model forward from a node's target.

        Args:
            name: a node.

        Returns:
            `(B,)`, the relative error to the output target, ‖f(target) − t‖ / ‖t‖, one number per sample. Of refined targets
            where the label is to lead (`"nearest"`, `"margin"`), the nearest output in which it does takes the place of t.
        """
        self.targets[name]  # an unknown name is refused here, with suggestions
        start = next(n for path, n in self._nodes.items() if name in (path, n.name))
        with torch.no_grad(), evaluating(self._graph):
            output = output_given(self._graph, self._values, start, self.targets[name])
        return row_norms(self._goal.missed(by_sample(self._goal.node, output)))

    def __repr__(self) -> str:
        rows = [f"Reconstruction of {len(self.output_target)} samples"]
        width = max(map(len, self.names))
        rows += [f"  {name:<{width}}  moved {moved:8.2e}  {how}" for name, moved, how in self._rows()]
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        title = f"Reconstruction of {len(self.output_target)} samples"
        return table(title, ("value", "moved, relatively", "its target"), self._rows())

    def _rows(self) -> Iterator[tuple[str, float, str]]:
        """Of every node, how far its target is from its anchor, in the mean, and how that was found."""
        for name in self.names:
            moved = relative(self.targets[name] - self.anchors[name], self.anchors[name]).mean()
            yield name, float(moved), str(self.certificates[name])
