"""Synthesize: from a normalized graph to its inverse graph, one node per inverted op.

The inverse graph walks the forward graph backwards (`flow.py` tells how). Its inputs are the output target and the
forward pass's values (the anchors); each op or region becomes a call of an `InverseOp`, which hands the op's rule what
the op was given and what it gave; its output is a pair of dictionaries, targets and certificates, by the names users
know.

    conv1_inverse = self.conv1_inverse(conv1_target, conv1, x, conv1_weight, conv1_bias, …)
    x_target      = conv1_inverse[0]
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxinvert.linalg import SolveSettings
from fxinvert.passes.capture import attribute, describe
from fxinvert.passes.computed import made_of, named_arguments, weights_of
from fxinvert.passes.copies import padded_arguments
from fxinvert.passes.flow import Flow, Stretch, has_target
from fxinvert.passes.interpreted import Interpreted
from fxinvert.passes.inverse_op import InverseOp
from fxinvert.passes.leaves import printable
from fxinvert.passes.region import Region, held, owner_of
from fxinvert.rules import RuleSet, Trainable
from fxinvert.rules.padded import PADDED, padded_convolution
from fxinvert.rules.region import ARITHMETIC, REGION
from fxinvert.rules.registry import matrix_free
from fxinvert.rules.rule import Kind

#: the inverse graph's first input
OUTPUT_TARGET = "output_target"
#: in the inverse graph's `meta`: the names of the forward nodes whose value an input is, and whose target a call finds
ANCHOR_OF, TARGET_OF = "anchor_of", "target_of"


def synthesize(graph: fx.GraphModule, rules: RuleSet, settings: SolveSettings) -> fx.GraphModule:
    """The inverse graph of a normalized graph.

    Raises:
        NoRuleError: the output does not depend on the input, or an op on the way has no rule.
    """
    flow, inverse = Flow(graph), _Synthesis(graph)
    targets: dict[str, fx.Node] = {flow.exit.meta["path"]: inverse.target}
    certificates: dict[str, fx.Node] = {}
    for stretch in flow.stretches:
        node, path = stretch.entry, stretch.entry.meta["path"]
        if stretch.is_region:
            op = inverse_region(stretch, rules, settings)
        elif stretch.copies:
            op = inverse_padded(stretch, rules, settings)
        else:
            op = inverse_op(stretch.exit, node, rules, settings)
        inverted = inverse.call(stretch, op, targets[stretch.exit.meta["path"]])
        targets[path] = inverse.item(inverted, 0, f"{node.name}_target")
        certificates[path] = inverse.item(inverted, 1, f"{node.name}_certificate")
    inverse.graph.output((targets, certificates))
    return printable(Interpreted(inverse.root, inverse.graph, "Inverse"))


def solved_systems(flow: Flow, rules: RuleSet) -> list[int]:
    """The numbers on the smaller side of the linear system of every op with a matrix or kernel of its own that is solved."""

    def shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["tensor_meta"].shape)

    def side(node: fx.Node) -> int:
        rule = rules.lookup(node.meta["op"])
        weight = max((shape(n) for n in node.all_input_nodes if n.op == "get_attr"), key=len, default=())
        if rule is None or rule.kind is not Kind.AFFINE or len(weight) < 2:
            return 0
        if "conv" not in rule.key or set(weight[2:]) == {1}:  # every position is a system of its own
            return min(weight[:2])
        taken = next(n for n in node.all_input_nodes if n.meta["active"])
        return min(math.prod(shape(n)[1:]) for n in (taken, node))

    stretches = (stretch for stretch in flow.stretches if not stretch.is_region)
    return [found for found in (side(stretch.exit) for stretch in stretches) if found]


def inverse_op(node: fx.Node, source: fx.Node, rules: RuleSet, settings: SolveSettings) -> InverseOp:
    """What inverts an op for one of its inputs, the others held.

    Raises:
        NoRuleError: there is no rule. The fallback differentiates, and so takes and gives one tensor.
    """
    differentiable = has_target(node) and has_target(source)
    rule = (rules if differentiable else rules.without_fallback()).require(node.meta["op"], describe(node))
    function = owner_of(node).get_submodule(str(node.target)) if node.op == "call_module" else node.target
    unknown = tree_leaves((node.args, node.kwargs)).index(source)
    rows = _rows(source, node)
    by_row = rule.kind not in _BY_SAMPLE or rule.counts_axes
    if not differentiable or (rows[0] == rows[1] and by_row):
        rows = (1, 1)  # what a rule is for works row by row
    elif rule.kind not in _BY_SAMPLE:
        rule = matrix_free(node.meta["op"])
    path = node.meta["path"]
    return InverseOp(rule, path, function, unknown, settings.at(path), rows)


def source_op(node: fx.Node, settings: SolveSettings) -> InverseOp:
    """An op that makes values of integers, as a function of these: to be looked at, for nothing inverts it."""
    unknown = next(n for n in node.all_input_nodes if n.op != "get_attr")
    place = tree_leaves((node.args, node.kwargs)).index(unknown)
    path = node.meta["path"]
    return InverseOp(matrix_free(node.meta["op"]), path, node.target, place, settings.at(path))


def inverse_region(stretch: Stretch, rules: RuleSet, settings: SolveSettings) -> InverseOp:
    """What inverts a region for its entry: the fallback, on the region's own graph."""
    name = f"{stretch.entry.meta['path']} → {stretch.exit.meta['path']}"
    rows = _rows(stretch.entry, stretch.exit)
    return InverseOp(
        matrix_free(REGION), name, Region(stretch, _entrywise(stretch, rules)), 0, settings, rows
    )


def _entrywise(stretch: Stretch, rules: RuleSet) -> bool:
    """Whether a region's values go their own ways: through functions of one value, and arithmetic of values in one place."""
    shape = stretch.entry.meta["tensor_meta"].shape

    def own_way(node: fx.Node) -> bool:
        rule = rules.lookup(node.meta["op"])
        known = rule is not None and (rule.kind is Kind.ELEMENTWISE or rule.key in ARITHMETIC)
        # what gives several tensors, as a maximum and its place, has no shape
        return known and getattr(node.meta["tensor_meta"], "shape", None) == shape

    return all(map(own_way, (*stretch.inside, stretch.exit)))


def inverse_padded(stretch: Stretch, rules: RuleSet, settings: SolveSettings) -> InverseOp:
    """What inverts a convolution together with what pads or repeats its input."""
    path, rule = stretch.exit.meta["path"], rules.require(PADDED, describe(stretch.exit))
    return InverseOp(rule, path, padded_convolution, 0, settings.at(path))


def arguments_of(stretch: Stretch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a stretch, as the one op that is inverted, is called with."""
    if stretch.is_region:
        return (stretch.entry, *held(stretch)), {}
    if stretch.copies:
        return padded_arguments(stretch.inside, stretch.exit), {}
    return stretch.exit.args, stretch.exit.kwargs


#: rules that ask nothing of the axes behind the first; their ops may mix the rows of a sample
_BY_SAMPLE = (Kind.MOVES, Kind.MATRIX_FREE)


def _rows(*nodes: fx.Node) -> tuple[int, int]:
    source, node = (n.meta["rows"] for n in nodes)
    return source, node


def renew(inverse: fx.GraphModule, forward: fx.GraphModule) -> None:
    """Makes an inverse graph read the forward graph's parameters and buffers where these have been replaced by others."""
    for node in inverse.graph.find_nodes(op="get_attr"):
        if attribute(inverse, str(node.target)) is not attribute(forward, str(node.target)):
            share(inverse, forward, str(node.target))


class _Synthesis:
    """The inverse graph in the making."""

    def __init__(self, forward: fx.GraphModule) -> None:
        self.forward, self.graph, self.root = forward, fx.Graph(), nn.Module()
        self.target = self._last_input = self.graph.placeholder(OUTPUT_TARGET)
        self._values: dict[str, fx.Node] = {}
        # the user's own modules may be called like an inverse, `encoder_inverse`
        self._taken = {str(n.target).split(".")[0] for n in forward.graph.find_nodes(op="get_attr")}

    def call(self, stretch: Stretch, op: InverseOp, target: fx.Node) -> fx.Node:
        """The call that gives a value its target, given the one that it follows from."""
        entry, exit_ = stretch.entry, stretch.exit
        name = f"{entry.name}_to_{exit_.name}_inverse" if stretch.inside else f"{exit_.name}_inverse"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        self.root.add_module(name, op)
        given, options = fx.node.map_arg(arguments_of(stretch), self.value)
        call = self.graph.call_module(name, (target, self.value(exit_), *given), options)
        call.meta[TARGET_OF] = entry.name
        return call

    def value(self, node: fx.Node) -> fx.Node:
        """A forward value in the inverse graph: a parameter is read, anything else is an input."""
        if node.name in self._values:
            return self._values[node.name]
        if node.op == "get_attr":
            share(self.root, self.forward, str(node.target))
            value = self.graph.get_attr(str(node.target))
        else:
            with self.graph.inserting_after(self._last_input):
                value = self.graph.placeholder(
                    node.name if node.name != OUTPUT_TARGET else f"{node.name}_anchor"
                )
            value.meta[ANCHOR_OF] = node.name
            self._last_input = value
        self._values[node.name] = value
        return value

    def item(self, node: fx.Node, index: int, name: str) -> fx.Node:
        return self.graph.create_node("call_function", operator.getitem, (node, index), name=name)


def trainable_of(node: fx.Node, rules: RuleSet) -> Trainable | None:
    """How an op depends on its parameters, if it can be trained in closed form."""
    trainable = rules.trainable(node.meta.get("op", ""))
    if trainable is None or node.op == "call_module":
        return trainable
    owner = node.graph.owning_module
    assert owner is not None, "a graph outside of its module"

    weights = weights_of(node)

    def seen(name: str, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value.op == "get_attr":
            return attribute(owner, str(value.target))
        shape = getattr(value.meta.get("tensor_meta"), "shape", None)
        return torch.empty(shape, device="meta") if name in weights and shape is not None else shape

    return trainable.of_call({name: seen(name, value) for name, value in named_arguments(node).items()})


def parameters_of(node: fx.Node) -> dict[str, str]:
    """The names of the parameters and buffers that an op reads, by argument name; of a whole module, by its own names.

    Of a computed weight they are those that it follows from, `weight.0`, `weight.1`, …
    """
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        named = owner.get_submodule(str(node.target)).named_parameters()
        return {name: f"{node.target}.{name}" for name, _ in named}
    read: dict[str, str] = {}
    for name, value in weights_of(node).items():
        if value.op == "get_attr":
            read[name] = str(value.target)
        else:
            read |= {f"{name}.{i}": str(n.target) for i, n in enumerate(made_of(value))}
    return read


def share(root: nn.Module, other: nn.Module, target: str) -> None:
    """Makes a parameter of another module readable in `root`, the same tensor under the same name."""
    *path, name = target.split(".")
    owner, tensor = root, attribute(other, target)
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)
