"""Invert: run a model forward, and its inverse graph backwards from the labels."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import DataError
from fxinvert.linalg import SolveSettings
from fxinvert.output_target import OutputTarget, OutputTargetFunction, output_target
from fxinvert.passes import trace
from fxinvert.passes.capture import evaluating
from fxinvert.passes.synthesize import OUTPUT_TARGET, InverseOp, chain, synthesize
from fxinvert.rules import Certificate, Op, RuleSet, Status, default_rules
from fxinvert.rules.certificate import relative, row_norms

V = TypeVar("V")


class ByName(Mapping[str, V]):
    """Values by node name: the module path (`"layer1.0.conv1"`) or the graph's own name (`"layer1_0_conv1"`)."""

    def __init__(self, values: Mapping[str, V], aliases: Mapping[str, str]) -> None:
        self._values, self._aliases = dict(values), aliases

    def __getitem__(self, name: str) -> V:
        known = name if name in self._values else self._aliases.get(name, name)
        if known not in self._values:
            close = difflib.get_close_matches(name, self._values, n=3, cutoff=0.4)
            raise KeyError(f"no node {name!r}; did you mean {', '.join(close or list(self._values)[:3])}?")
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
        certificates: how each op was inverted, that is, how the target of the node before it was found.
        output_target: the target of the model's output.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        values: Mapping[fx.Node, Any],
        targets: Mapping[str, Tensor],
        certificates: Mapping[str, Certificate],
    ) -> None:
        self._graph, self._values = graph, values
        nodes = [node for node in graph.graph.nodes if node.meta.get("path") in targets]
        aliases = {node.name: node.meta["path"] for node in nodes}
        self._nodes = {node.meta["path"]: node for node in nodes}
        self.names: list[str] = list(self._nodes)
        self.anchors: Mapping[str, Tensor] = ByName(
            {name: values[self._nodes[name]] for name in self.names}, aliases
        )
        self.targets: Mapping[str, Tensor] = ByName({name: targets[name] for name in self.names}, aliases)
        self.certificates: Mapping[str, Certificate] = ByName(
            {name: certificates.get(name) or _nothing_inverted(self.anchors[name]) for name in self.names},
            aliases,
        )
        self.output_target = self.targets[self.names[-1]]

    def consistency(self, name: str) -> Tensor:
        """Runs the model forward from a node's target.

        Args:
            name: a node.

        Returns:
            `(B,)`, the relative error to the output target, ‖f(target) − t‖ / ‖t‖, one number per sample.
        """
        self.targets[name]  # an unknown name is refused here, with suggestions
        start = next(n for path, n in self._nodes.items() if name in (path, n.name))
        with torch.no_grad(), evaluating(self._graph):
            output = _rerun(self._graph, self._values, {start: self.targets[name]})
        return relative(output - self.output_target, self.output_target)

    def __repr__(self) -> str:
        rows = [f"Reconstruction of {len(self.output_target)} samples"]
        width = max(map(len, self.names))
        for name in self.names:
            moved = relative(self.targets[name] - self.anchors[name], self.anchors[name]).mean()
            rows.append(f"  {name:<{width}}  moved {float(moved):8.2e}  {self.certificates[name]}")
        return "\n".join(rows)


class InverseGraph:
    """A model's graph with its synthesized inverse.

    Attributes:
        graph: the normalized forward graph.
        graph_module: the inverse graph, a `torch.fx.GraphModule` from the output target and the forward values to the
            targets and certificates.
        output_target: how the output's target is made of outputs and labels.
    """

    def __init__(
        self, graph: fx.GraphModule, output_target: OutputTarget, rules: RuleSet, settings: SolveSettings
    ) -> None:
        self.graph, self.output_target = graph, output_target
        self.graph_module = synthesize(graph, rules, settings)
        self._by_name = {node.name: node for node in graph.graph.nodes}
        self._inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._last: fx.Node = next(chain(graph))[0]

    def __call__(self, inputs: Tensor | tuple[Any, ...], labels: Tensor) -> Reconstruction:
        """Targets, anchors and certificates of every node, for one batch.

        Args:
            inputs: what the model takes, each `(B, …)`.
            labels: what `output_target` takes, e.g. class numbers `(B,)`.

        Raises:
            DataError: inputs or labels do not fit.
        """
        with torch.no_grad(), evaluating(self.graph):
            values = self.forward(inputs)
            target = self.output_target(values[self._last], labels)
            targets, certificates = self.graph_module(target, *self._arguments(values))
        return Reconstruction(self.graph, values, targets, certificates)

    def forward(self, inputs: Tensor | tuple[Any, ...]) -> dict[fx.Node, Any]:
        """The forward pass, with the value of every node.

        Raises:
            DataError: the model does not take these inputs.
        """
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        if len(given) != len(self._inputs):
            raise DataError(f"the model takes {len(self._inputs)} inputs; {len(given)} were given")
        for node, value in zip(self._inputs, given, strict=True):
            meta = node.meta.get("tensor_meta")
            if meta is not None and (not isinstance(value, Tensor) or value.shape[1:] != meta.shape[1:]):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                expected = ("B", *meta.shape[1:])
                raise DataError(
                    f"input {node.name!r} has shape {shape}; the model was traced with {expected}"
                )
        values: dict[fx.Node, Any] = dict(zip(self._inputs, given, strict=True))
        _rerun(self.graph, values, {})
        return values

    def targets(
        self, values: Mapping[fx.Node, Any], labels: Tensor, nodes: Sequence[fx.Node]
    ) -> dict[fx.Node, Tensor]:
        """The targets of some nodes only; the inverse graph is walked no further than needed.

        Args:
            values: of `forward`.
            labels: the batch's labels.
            nodes: forward nodes.
        """
        target = self.output_target(values[self._last], labels)
        wanted = {node.meta["path"]: node for node in nodes}
        runner = fx.Interpreter(self.graph_module, garbage_collect_values=False)
        names = {n: path for path, n in self._outputs()[0].items()}
        supplied = dict(
            zip((p.name for p in self._placeholders()), (target, *self._arguments(values)), strict=True)
        )
        found: dict[fx.Node, Tensor] = {}
        for node in self.graph_module.graph.nodes:
            if len(found) == len(wanted):
                break
            runner.env[node] = supplied[node.name] if node.op == "placeholder" else runner.run_node(node)
            if names.get(node) in wanted:
                found[wanted[names[node]]] = runner.env[node]
        return found

    def op(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Op:
        """A forward node as rules see it, with the values of one forward pass."""
        inverted = self.inverse_op(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        return inverted.op(values[node], args, kwargs)

    @property
    def output_node(self) -> fx.Node:
        """The forward node that gives the supervised output."""
        return self._last

    def inverse_op(self, node: fx.Node) -> InverseOp:
        """The inverse graph's module for a forward node."""
        module = self.graph_module.get_submodule(f"{node.name}_inverse")
        assert isinstance(module, InverseOp)
        return module

    def __repr__(self) -> str:
        rows = [f"InverseGraph, output target {self.output_target.name!r}"]
        for node, source in chain(self.graph):
            if source is not None:
                rule = self.inverse_op(node).rule
                rows.append(f"  {node.meta['path']} → {source.meta['path']}: {rule.key}, {rule.kind.value}")
        return "\n".join(rows)

    def _placeholders(self) -> list[fx.Node]:
        return list(self.graph_module.graph.find_nodes(op="placeholder"))

    def _arguments(self, values: Mapping[fx.Node, Any]) -> list[Any]:
        return [values[self._by_name[p.name]] for p in self._placeholders() if p.name != OUTPUT_TARGET]

    def _outputs(self) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
        (output,) = self.graph_module.graph.find_nodes(op="output")
        return output.args[0]


def invert(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    output_target: str | OutputTargetFunction = "nearest",
    rules: RuleSet | None = None,
    condition_limit: float = 1e3,
) -> InverseGraph:
    """Synthesizes the inverse of a model.

    Args:
        model: a graph from `fxinvert.trace`, or any module together with `example_inputs`.
        example_inputs: a tensor, or the tuple of the model's inputs.
        output_target: what the output should have been, by name (`"nearest"`, `"margin"`, `"cross_entropy"`,
            `"max_assign"`, `"one_hot"`, `"regression"`, `"soft"`) or a callable of outputs and labels.
        rules: the rules in force, by default `default_rules()`.
        condition_limit: κ; corrections amplified more than that are damped.

    Raises:
        TraceError: the model cannot be captured.
        NoRuleError: an op on the way has no rule.
        DataError: there is no such output target.
    """
    rules = rules or default_rules()
    if example_inputs is not None:
        model = trace(model, example_inputs, rules=rules)
    if not isinstance(model, fx.GraphModule):
        raise DataError("invert() needs example_inputs, or a graph from fxinvert.trace")
    return InverseGraph(model, _named(output_target), rules, SolveSettings(condition_limit=condition_limit))


_named = output_target


def _rerun(graph: fx.GraphModule, values: Mapping[fx.Node, Any], given: Mapping[fx.Node, Any]) -> Tensor:
    """Runs a graph, keeping in `values` what it computes; with `given`, only what depends on the given nodes anew."""
    runner = fx.Interpreter(graph, garbage_collect_values=False)
    runner.env = dict(values) | dict(given)
    changed = dict.fromkeys(given)
    for node in graph.graph.nodes:
        if node.op == "output":
            return runner.env[node.args[0]]  # type: ignore[no-any-return]
        if node in given or (node in values and not any(n in changed for n in node.all_input_nodes)):
            continue
        runner.env[node] = runner.run_node(node)
        if given:
            changed[node] = None
        else:
            assert isinstance(values, dict)
            values[node] = runner.env[node]
    raise AssertionError("a graph without output")


def _nothing_inverted(anchor: Tensor) -> Certificate:
    zeros = row_norms(torch.zeros_like(anchor))
    return Certificate(Status.PASSED_THROUGH, zeros, zeros, torch.zeros_like(zeros, dtype=torch.bool))
