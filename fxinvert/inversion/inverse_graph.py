"""Invert: run a model forward, and its inverse graph backwards from the labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import REPORT, DataError, SolveError, TraceError, out_of_memory
from fxinvert.heads import Heads
from fxinvert.inversion.attainable import Bound, within_reach
from fxinvert.inversion.forward_certificate import certified_forward
from fxinvert.inversion.goal import Goal, Miss
from fxinvert.inversion.inputs import check_shape, other_types
from fxinvert.inversion.linearized import CAREFUL, Effort, linearized_targets
from fxinvert.inversion.reconstruction import Reconstruction
from fxinvert.inversion.refinement import refine
from fxinvert.inversion.replay import forward_values
from fxinvert.inversion.rest import Rest
from fxinvert.inversion.source import Source
from fxinvert.inversion.stepping import TOLERANCE
from fxinvert.inversion.synthesis import Synthesis
from fxinvert.linalg import SolveSettings
from fxinvert.linalg.vectors import norm
from fxinvert.modes import as_usual
from fxinvert.notebook import table
from fxinvert.output_target import OutputTarget
from fxinvert.passes.capture import evaluating
from fxinvert.passes.flow import Flow, Stretch, by_sample, has_target
from fxinvert.passes.inverse_op import InverseOp
from fxinvert.passes.synthesize import arguments_of, inverse_op, source_op, trainable_of
from fxinvert.rules import Certificate, Op, RuleSet, Trainable

Reconstructed = Literal["nodewise", "linearized"]
#: κ of linearized targets: a first-order model of the output is no better than that
LINEARIZED_LIMIT = 30.0


class InverseGraph:
    """A model's graph with its synthesized inverse.

    Attributes:
        graph: the normalized forward graph.
        graph_module: the inverse graph, a `torch.fx.GraphModule` from the output target and the forward values to the
            targets and certificates.
        output_target: how the output's target is made of outputs and labels.
        refine: the largest number of Gauss–Newton steps on every target.
        reconstruction: `"nodewise"`, by the inverse graph, or `"linearized"`, by the output's derivative.
        effort: how closely linearized targets are found.
        synthesis: of the inverse graph, which is made when it is first needed.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        output_target: OutputTarget,
        rules: RuleSet,
        settings: SolveSettings,
        refine: int = 0,
        reconstruction: Reconstructed = "nodewise",
        source: nn.Module | None = None,
        effort: Effort = CAREFUL,
    ) -> None:
        self.graph, self.refine, self.effort = graph, refine, effort
        self._source = Source(source, graph)
        self.output_target = Heads.of(graph).target(output_target)
        self.reconstruction: Reconstructed = reconstruction
        self.synthesis = Synthesis(graph, rules, settings)
        self._ops: dict[str, InverseOp] = {}

    def __call__(self, inputs: Any, labels: Any) -> Reconstruction:
        """Targets, anchors and certificates of every node, for one batch.

        Args:
            inputs: what the model takes, as it was traced: a tensor, a tuple, or a mapping; each tensor `(B, …)`.
            labels: what `output_target` takes, e.g. class numbers `(B,)`; for several outputs, by their names.

        Raises:
            DataError: inputs or labels do not fit.
        """
        with as_usual(), torch.no_grad(), evaluating(self.graph):
            values = self.forward(inputs)
            goal, bound = self._goal(values, labels)
            nodes = [node for node in Flow(self.graph).nodes if has_target(node)]
            certificates: dict[str, Certificate] = {}
            if self.reconstruction == "linearized":
                targets = self._linearized(values, nodes, goal.target)
            else:
                by_path, certificates = self.graph_module(goal.target, *self.synthesis.walk.anchors(values))
                targets = {node: by_path[node.meta["path"]] for node in nodes}
            refined = self._refined(targets, values, goal, bound)
            if self.reconstruction == "linearized" or self.refine:
                certificates = certified_forward(
                    self.graph, refined, values, goal, self._damping, self.refine > 0, bound
                )
        paths = {node.meta["path"]: value for node, value in refined.items()}
        return Reconstruction(self.graph, values, paths, certificates, goal)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The inverse graph, with its code; where single targets are wanted it is only walked."""
        return self.synthesis.module

    def towards(self, output_target: OutputTarget) -> InverseGraph:
        """The same inverse for another output target; graphs and factorizations are shared."""
        other = copy.copy(self)
        other.output_target = Heads.of(self.graph).target(output_target)
        return other

    def forward(self, inputs: Any) -> dict[fx.Node, Any]:
        """The forward pass, with the value of every node.

        Raises:
            DataError: the model does not take these inputs.
        """
        self._source.follow(self.graph)
        nodes = list(self.graph.graph.find_nodes(op="placeholder"))
        try:
            given = self.graph.meta["inputs"].tensors(inputs)
        except TraceError as error:
            raise DataError(str(error)) from error
        for node, value in zip(nodes, given, strict=True):
            check_shape(node, value)
        try:
            return forward_values(self.graph, dict(zip(nodes, given, strict=True)))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"the model does not run on these inputs: {error}{other_types(nodes, given)}"
            ) from error

    def targets(
        self, values: Mapping[fx.Node, Any], labels: Tensor, nodes: Sequence[fx.Node]
    ) -> dict[fx.Node, Tensor]:
        """The targets of some nodes only; the inverse graph is walked no further than needed.

        Args:
            values: of `forward`.
            labels: the batch's labels.
            nodes: forward nodes.

        Raises:
            DataError: the labels do not fit.
            NoRuleError: one of the nodes does not lie between input and output, so that it has no target.
        """
        if self.reconstruction == "linearized":
            with torch.no_grad():
                goal, bound = self._goal(values, labels)
                return self._refined(self._linearized(values, nodes, goal.target), values, goal, bound)
        with torch.no_grad():
            goal, bound = self._goal(values, labels)
            found = self.synthesis.walk.targets(goal.target, values, nodes)
            return self._refined(found, values, goal, bound)

    def op(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Op:
        """A forward node as rules see it, with the values of one forward pass."""
        inverted = self.inverse_op(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        return inverted.op(values[node], args, kwargs)

    def inverse_of(self, stretch: Stretch) -> InverseOp:
        """What finds the target of a stretch's entry in the inverse graph."""
        return self.synthesis.op(stretch)

    def op_of(self, stretch: Stretch, values: Mapping[fx.Node, Any]) -> Op:
        """A stretch as its rule sees it, with the values of one forward pass."""
        args, kwargs = fx.node.map_arg(arguments_of(stretch), lambda n: values[n])
        return self.inverse_of(stretch).op(values[stretch.exit], args, kwargs)

    @property
    def output_node(self) -> fx.Node:
        """The forward node that gives the supervised output."""
        (output,) = self.graph.graph.find_nodes(op="output")
        return output.args[0]  # type: ignore[no-any-return]

    def inverse_op(self, node: fx.Node) -> InverseOp:
        """What inverts a forward op for the first of its inputs that follows the model's input; an op with none is shown.

        Raises:
            NoRuleError: there is no rule.
        """
        if node.name not in self._ops:
            source = next((n for n in node.all_input_nodes if n.meta["active"]), None)
            self._ops[node.name] = (
                source_op(node, self.synthesis.settings)
                if source is None
                else inverse_op(node, source, self.synthesis.rules, self.synthesis.settings)
            )
        return self._ops[node.name]

    def trainable(self, node: fx.Node) -> Trainable:
        """The parameter side of a forward op that is trained."""
        found = trainable_of(node, self.synthesis.rules)
        assert found is not None, f"{node.name} cannot be trained. {REPORT}"
        return found

    def explain(self) -> str:
        """How the linear systems of every op are solved, and why; as far as any have been solved yet."""
        ops = [op for op in self.synthesis.inverse.modules() if isinstance(op, InverseOp)]
        return "\n".join(f"{op.name}: {told}" for op in ops for told in op.explain())

    def __repr__(self) -> str:
        rows = [f"  {path}: {op}, {how}" for path, op, how in self._steps()]
        return "\n".join([f"InverseGraph, {self._manner()}", *rows, *(f"  {stop}" for stop in self._stops())])

    def _repr_html_(self) -> str:
        return table(
            "InverseGraph", ("target of → of", "op", "how"), self._steps(), [self._manner(), *self._stops()]
        )

    def _manner(self) -> str:
        manner = f"output target {self.output_target.name!r}"
        manner += ", linearized" if self.reconstruction == "linearized" else ""
        return manner + (f", at most {self.refine} steps of refinement" if self.refine else "")

    def _steps(self) -> Iterator[tuple[str, str, str]]:
        """From the output back: whose target leads to whose, the op, and how it is inverted."""
        for stretch in Flow(self.graph).stretches:
            rule = self.inverse_of(stretch).rule
            path = " → ".join(node.meta["path"] for node in (stretch.exit, stretch.entry))
            yield path, rule.key, rule.kind.value

    def _stops(self) -> Iterator[str]:
        for node in Flow(self.graph).sources:
            if node.op != "placeholder":
                path, op = node.meta["path"], node.meta["op"]
                yield f"the target stops at {path!r}: the values of {op!r} do not follow its input"

    def _linearized(
        self, values: Mapping[fx.Node, Any], nodes: Sequence[fx.Node], target: Tensor
    ) -> dict[fx.Node, Tensor]:
        limit = self.synthesis.settings.condition_limit or LINEARIZED_LIMIT
        memory = self.synthesis.settings.memory(target.device)
        try:
            return linearized_targets(self.graph, values, nodes, target, limit, memory, self.effort)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise SolveError(
                f"memory ran out where the targets of {len(nodes)} values were found from the output's derivative ({error}); give "
                "fewer samples at once, or a smaller memory_limit"
            ) from error

    @property
    def _damping(self) -> float:
        """What linearized targets are damped with, relative to trace JJᵀ."""
        linearized = self.reconstruction == "linearized"
        return (self.synthesis.settings.condition_limit or LINEARIZED_LIMIT) ** -2 if linearized else 0.0

    def _goal(self, values: Mapping[fx.Node, Any], labels: Any) -> tuple[Goal, Bound | None]:
        """The output target; where targets are refined all outputs that are right, in reach, and what is proven of them."""
        node = self.output_node
        goal = Goal.of(self.output_target, node, values[node], labels)
        if self.refine:
            return within_reach(self.graph, values, goal)
        return goal if goal.project is None else replace(goal, project=None), None

    def _refined(
        self,
        targets: Mapping[fx.Node, Tensor],
        values: Mapping[fx.Node, Any],
        goal: Goal,
        bound: Bound | None,
    ) -> dict[fx.Node, Tensor]:
        """The targets after Gauss–Newton steps, as far as they are wanted; the output's own stays."""

        def refined(node: fx.Node, start: Tensor) -> Tensor:
            if not self.refine or node is self.output_node:
                return start
            miss = Miss(Rest(self.graph, values, node), goal)
            found, anchor = (by_sample(node, value) for value in (start, values[node]))
            rows = (norm(miss(found)) > TOLERANCE).nonzero()[:, 0]
            if not len(rows):
                return start
            hopeless = None if bound is None else bound.forbids(miss.rest)[rows]
            better = refine(miss.of(rows), found[rows], anchor[rows], self.refine, hopeless)
            return found.index_copy(0, rows, better).reshape(start.shape)

        return {node: refined(node, target) for node, target in targets.items()}
