"""Synthesize: from a normalized graph to its inverse graph, one node per inverted op.

The inverse graph walks the forward graph backwards. Its inputs are the output target and the forward pass's values
(the anchors); each op becomes a call of an `InverseOp`, which hands the op's rule what the op was given and what it
gave; its output is a pair of dictionaries, targets and certificates, by the names users know.

    conv1_inverse = self.conv1_inverse(conv1_target, conv1, x, conv1_weight, conv1_bias, …)
    x_target      = conv1_inverse[0]
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxinvert.errors import NoRuleError
from fxinvert.linalg import SolveSettings
from fxinvert.passes.capture import attribute, describe, no_path
from fxinvert.passes.inverse_op import InverseOp, call_arguments
from fxinvert.passes.leaves import leaves, printable
from fxinvert.rules import Rule, RuleSet

#: the inverse graph's first input
OUTPUT_TARGET = "output_target"
#: in the inverse graph's `meta`: the name of the forward node whose value an input is, and of the one that is inverted
ANCHOR_OF, INVERSE_OF = "anchor_of", "inverse_of"


def synthesize(graph: fx.GraphModule, rules: RuleSet, settings: SolveSettings) -> fx.GraphModule:
    """The inverse graph of a normalized graph.

    Raises:
        NoRuleError: an op on the way has no rule, several unknown inputs, or several consumers.
    """
    inverse = _Synthesis(graph)
    targets: dict[str, fx.Node] = {}
    certificates: dict[str, fx.Node] = {}
    target = inverse.target
    for node, source in chain(graph):
        targets[node.meta["path"]] = target
        if source is None:
            break
        rule = _rule(node, source, rules)
        function = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        op = InverseOp(rule, node.meta["path"], function, _position(node, source), settings)
        inverted = inverse.call(node, op, target)
        target = inverse.item(inverted, 0, f"{source.name}_target")
        certificates[node.meta["path"]] = inverse.item(inverted, 1, f"{node.name}_certificate")
    inverse.graph.output((targets, certificates))
    return printable(fx.GraphModule(inverse.root, inverse.graph, "Inverse"))


def _rule(node: fx.Node, source: fx.Node, rules: RuleSet) -> Rule:
    """The rule that inverts a node; the fallback differentiates, and so takes and gives one tensor.

    Raises:
        NoRuleError: there is none.
    """
    single = all(isinstance(n.meta.get("tensor_meta"), TensorMetadata) for n in (node, source))
    return (rules if single else rules.without_fallback()).require(node.meta["op"], describe(node))


class _Synthesis:
    """The inverse graph in the making."""

    def __init__(self, forward: fx.GraphModule) -> None:
        self.forward, self.graph, self.root = forward, fx.Graph(), nn.Module()
        self.target = self._last_input = self.graph.placeholder(OUTPUT_TARGET)
        self._values: dict[str, fx.Node] = {}
        # the user's own modules may be called like an inverse, `encoder_inverse`
        self._taken = {str(n.target).split(".")[0] for n in forward.graph.find_nodes(op="get_attr")}

    def call(self, node: fx.Node, op: InverseOp, target: fx.Node) -> fx.Node:
        """The call that inverts a forward node, given the target of its output."""
        name = f"{node.name}_inverse"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        self.root.add_module(name, op)
        output = self.value(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        call = self.graph.call_module(name, (target, output, *args), kwargs)
        call.meta[INVERSE_OF] = node.name
        return call

    def value(self, node: fx.Node) -> fx.Node:
        """A forward value in the inverse graph: a parameter is read, anything else is an input."""
        if node.name in self._values:
            return self._values[node.name]
        if node.op == "get_attr":
            _share(self.root, self.forward, str(node.target))
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


def _position(node: fx.Node, source: fx.Node) -> int:
    """At which position an op takes the input whose target is asked for.

    Raises:
        NoRuleError: it takes it more than once, or not as an argument of its own.
    """
    times = leaves((node.args, node.kwargs)).count(source)
    if times > 1:
        raise NoRuleError(
            f"{describe(node)} takes {source.meta['path']!r} {times} times: branching graphs cannot be inverted yet"
        )
    for i, argument in enumerate(node.args):
        if argument is source:
            return i
    raise NoRuleError(
        f"{describe(node)} takes its input inside a list or by keyword; no rule handles that yet"
    )


def chain(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """The nodes between output and input, output first, each with the node that feeds it (None for the input).

    Raises:
        NoRuleError: the graph branches.
    """
    (output,) = graph.graph.find_nodes(op="output")
    node = output.args[0]
    if not node.meta["active"]:
        raise NoRuleError(no_path(graph))
    while node is not None:
        used = [user for user in node.users if user.op == "output" or user.meta["active"]]
        if len(used) > 1:
            raise NoRuleError(
                f"{describe(node)} feeds {len(used)} ops ({', '.join(u.meta.get('path', 'output') for u in used)}); "
                "branching graphs cannot be inverted yet"
            )
        sources = [source for source in node.all_input_nodes if source.meta["active"]]
        if len(sources) > 1:
            raise NoRuleError(
                f"{describe(node)} has {len(sources)} inputs that depend on the model's input "
                f"({', '.join(s.meta['path'] for s in sources)}); branching graphs cannot be inverted yet"
            )
        source = sources[0] if sources else None
        yield node, source
        node = source


def parameters_of(node: fx.Node) -> dict[str, str]:
    """The names of the parameters and buffers that an op reads, by argument name; of a whole module, by its own names."""
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        named = owner.get_submodule(str(node.target)).named_parameters()
        return {name: f"{node.target}.{name}" for name, _ in named}
    arguments = call_arguments(node.target, node.args, node.kwargs)
    return {k: str(n.target) for k, n in arguments.items() if isinstance(n, fx.Node) and n.op == "get_attr"}


def _share(root: nn.Module, graph: fx.GraphModule, target: str) -> None:
    """Makes a parameter of the forward graph readable in the inverse graph, the same tensor under the same name."""
    *path, name = target.split(".")
    owner, tensor = root, attribute(graph, target)
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)
