"""Explain: run a model forward and back for some samples, and measure what every cut's correction does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxinvert.errors import CutError
from fxinvert.explanation.attention import attention_weights, attentions
from fxinvert.explanation.result import Attention, Cut, Explanation, Value
from fxinvert.heads import Heads
from fxinvert.inversion.choice import reconstruction_for
from fxinvert.inversion.inverse_graph import InverseGraph, Reconstructed
from fxinvert.inversion.invert import invert
from fxinvert.inversion.replay import output_given
from fxinvert.inversion.stepping import ROWS
from fxinvert.labels import is_classification
from fxinvert.linalg.vectors import per_sample
from fxinvert.modes import as_usual
from fxinvert.output_target import OutputTargetFunction
from fxinvert.passes import trace
from fxinvert.passes.capture import evaluating
from fxinvert.passes.flow import Flow, has_target
from fxinvert.passes.outputs import Key
from fxinvert.passes.partition import partition
from fxinvert.passes.plan import Plan, Segment
from fxinvert.passes.trace import by_sample, is_normalized
from fxinvert.rules import RuleSet
from fxinvert.rules.certificate import row_norms
from fxinvert.training.batch import labels_by_sample

#: Gauss–Newton steps on every target where targets are linearized; of outputs of many numbers, whose
#: steps cost conjugate gradients. More change shares by no more than 0.02
REFINE, REFINE_WIDE = 2, 1
#: ops after which a value is shown as it was before
RESHAPES = ("flatten", "reshape", "view")

Values = Mapping[fx.Node, Any]


@as_usual()
def explain(
    model: nn.Module,
    inputs: Any,
    labels: Any,
    *,
    plan: Plan | None = None,
    output_target: str | OutputTargetFunction = "auto",
    output: Key | tuple[Key, ...] | None = None,
    reconstruction: Reconstructed | Literal["auto"] = "auto",
    rules: RuleSet | None = None,
) -> Explanation:
    """What a network computed, what it should have computed, and where it went wrong, sample by sample.

    Args:
        model: any module that `fxinvert.trace` captures, or a graph that it has made.
        inputs: what the model takes: a tensor `(B, …)`, a tuple or a mapping of them.
        labels: class numbers `(B,)` or values; for several outputs by their names.
        plan: whose cuts are explained, from `fxinvert.partition`; by default one segment per trainable op.
        output_target: what the output should have been; `"auto"`: `"margin"` for classes, `"regression"` for values.
        output: which output is supervised, by index or key, or a tuple of those that are.
        reconstruction: how targets are found, see `fxinvert.invert`; `"auto"`: as in post-training, and
            refined where it is linearized.
        rules: the rules in force.

    Returns:
        Of every sample, every cut's value and target, and the share of the output error that its correction accounts
        for (`Explanation` defines it).

    Raises:
        TraceError: the model cannot be captured.
        NoRuleError: an op on the way has no rule.
        CutError: the plan was made for another graph.
        DataError: inputs or labels do not fit.
    """
    graph = model if is_normalized(model) else trace(model, _twice(inputs), output=output, rules=rules)
    assert isinstance(graph, fx.GraphModule)
    graph = by_sample(graph, _twice(inputs), rules)
    labels = labels_by_sample(labels, next(iter(tree_leaves(inputs)), None))
    plan = plan or partition(graph, rules=rules)
    if reconstruction == "auto":
        reconstruction = reconstruction_for(graph, rules)
    linearized = reconstruction == "linearized"
    inverse = invert(
        graph,
        output_target=_target_for(labels) if output_target == "auto" else output_target,
        rules=rules,
        reconstruction=reconstruction,
        refine=(REFINE if Flow(graph).size <= ROWS else REFINE_WIDE) if linearized else 0,
    )
    with torch.no_grad(), evaluating(graph):
        return _Explainer(inverse, plan, inputs, labels).explanation()


class _Explainer:
    """One forward and one backward pass, and what is measured on them."""

    def __init__(self, inverse: InverseGraph, plan: Plan, inputs: Any, labels: Any) -> None:
        self.inverse, self.graph, self.plan, self.labels = inverse, inverse.graph, plan, labels
        self.nodes = {n.meta["path"]: n for n in self.graph.graph.nodes if n.op != "output"}
        for path in (path for segment in plan.segments for path in (*segment.trained, segment.exit)):
            if path not in self.nodes:
                raise CutError(f"the plan was made for another graph: this one has no {path!r}")
        self.flow = set(Flow(self.graph).nodes)
        self.values = inverse.forward(inputs)
        self.output: Tensor = self.values[inverse.output_node]
        self.wanted = inverse.output_target(self.output, labels)
        self.targets = inverse.targets(self.values, labels, self._shown())

    def explanation(self) -> Explanation:
        return Explanation(
            labels=self.labels,
            output=self.output,
            output_target=self.wanted,
            inputs=tuple(self._value(node) for node in self._inputs()),
            cuts=tuple(self._cuts()),
            attention=tuple(self._attention()),
            heads=Heads.of(self.graph),
            kind=self.inverse.output_target.name,
        )

    def _inputs(self) -> list[fx.Node]:
        return list(self.graph.graph.find_nodes(op="placeholder"))

    def _shown(self) -> list[fx.Node]:
        """The nodes whose targets are shown."""
        found = [node for node in self._inputs() if node in self.flow and has_target(node)]
        for segment in self.plan.segments:
            found += [*self._inside(segment), self.nodes[segment.exit]]
        return list(dict.fromkeys(found))

    def _inside(self, segment: Segment) -> list[fx.Node]:
        """What a segment's trained ops compute, where there are several."""
        if len(segment.trained) < 2:
            return []
        nodes = [self.nodes[path] for path in segment.trained if path != segment.exit]
        return [node for node in nodes if node in self.flow and has_target(node)]

    def _value(self, node: fx.Node) -> Value:
        value = self.values[node]
        op = "input" if node.op == "placeholder" else str(node.meta["op"])
        target = self.targets.get(node, value)
        return Value(node.meta["path"], op, _apart(node, value), _apart(node, target), _shape_shown(node))

    def _cuts(self) -> Iterator[Cut]:
        segments = self.plan.segments
        found = [self._value(self.nodes[segment.exit]) for segment in segments]
        removed = [self._removed(cut, cut.target) for cut in found]
        parts = joint_parts(
            torch.stack(removed, 1).double(), torch.stack([c.moved for c in found], 1).double()
        )
        for i, (segment, cut) in enumerate(zip(segments, found, strict=True)):
            part = parts[:, i].to(cut.anchor.dtype)
            moved = cut.anchor + per_sample(part, cut.anchor) * cut.correction
            yield Cut(
                cut.name,
                cut.op,
                cut.anchor,
                cut.target,
                cut.shape,
                segment=segment.name,
                inside=tuple(self._value(node) for node in self._inside(segment)),
                removed=removed[i],
                part=part,
                share=self._removed(cut, moved),
            )

    def _removed(self, cut: Value, value: Tensor) -> Tensor:
        """`(B,)`: how far the output moves along its error if a cut has this value; 1 is all the way."""
        node = self.nodes[cut.name]
        output = output_given(self.graph, self.values, node, value.reshape(self.values[node].shape))
        return along(output - self.output, self.wanted - self.output)

    def _attention(self) -> Iterator[Attention]:
        cuts = [self.nodes[segment.exit] for segment in self.plan.segments]
        starts = [node for node in self._inputs() if node in self.targets] + cuts
        order = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        for node in attentions(self.graph):
            before = [start for start in starts if order[start] < order[node]]
            if not before:
                continue
            start = before[-1]
            weights = [
                attention_weights(self.graph, self.values, node, start, value)
                for value in (self.values[start], self.targets[start])
            ]
            if all(weight is not None and weight.dim() == 4 for weight in weights):
                yield Attention(node.meta["path"], start.meta["path"], *weights)  # type: ignore[arg-type]


def joint_parts(removed: Tensor, moved: Tensor) -> Tensor:
    """The parts p of the corrections that together remove the output error, to first order, and move the least.

    They minimize Σ (p_k·m_k)² where Σ p_k·e_k = 1.

    Args:
        removed: e `(B, K)`, what each correction removes alone; negative ones take no part.
        moved: m `(B, K)`, how far each moves, relatively.

    Returns:
        `(B, K)`; 0 for a sample that no correction helps.
    """
    helps = (removed > 0) & (moved > 0)
    scaled = torch.where(helps, removed / torch.where(helps, moved, 1.0).square(), 0.0)
    total = (scaled * removed).sum(1, keepdim=True)
    return torch.where(total > 0, scaled / torch.where(total > 0, total, 1.0), 0.0)


def along(change: Tensor, error: Tensor) -> Tensor:
    """`(B,)`: ⟨change, error⟩ / ‖error‖², the share of an error that a change removes; 0 where there is none."""
    length = row_norms(error).double().square()
    product = (change.double() * error.double()).flatten(1).sum(1)
    return torch.where(length > 0, product / torch.where(length > 0, length, 1.0), 0.0).to(change.dtype)


def _apart(node: fx.Node, value: Tensor) -> Tensor:
    """A value `(B·k, …)` with k rows of every sample as `(B, k, …)`; others as they are."""
    rows = node.meta["rows"]
    return torch.unflatten(value, 0, (-1, rows)) if rows > 1 else value


def _shape_shown(node: fx.Node) -> tuple[int, ...]:
    """A value's shape without the batch; if it was only reshaped, that of the value before."""
    while node.meta.get("op") in RESHAPES:
        node = node.all_input_nodes[0]
    rows = node.meta["rows"]
    return (*((rows,) if rows > 1 else ()), *node.meta["tensor_meta"].shape[1:])


def _target_for(labels: Any) -> str:
    classes = any(is_classification(own) for own in tree_leaves(labels))
    return "margin" if classes else "regression"


def _twice(inputs: Any) -> Any:
    """The samples twice, if it is only one: a graph traced with one sample could not tell the batch's axis."""
    count = min((len(leaf) for leaf in tree_leaves(inputs)), default=0)
    return tree_map(lambda value: torch.cat([value, value]), inputs) if count == 1 else inputs
