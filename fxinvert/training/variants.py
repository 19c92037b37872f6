"""Variants: a graph run with several sets of parameters; what none of them changes is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.func import functional_call

from fxinvert.inversion.replay import Evaluator, Values
from fxinvert.passes.capture import attribute
from fxinvert.training.context import Context


def given_by(context: Context, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
    """The nodes that read some parameters or buffers, with other values for them."""
    others = {id(context.tensors[name]): value for name, value in tensors.items()}
    read = {
        node: id(attribute(context.graph, str(node.target)))
        for node in context.graph.graph.find_nodes(op="get_attr")
    }
    return {node: others[own] for node, own in read.items() if own in others}


def modules_of(context: Context, tensors: Mapping[str, Tensor]) -> dict[fx.Node, dict[str, Tensor]]:
    """The nodes that run a module as a whole which holds some parameters or buffers, with its own names for them."""
    found: dict[fx.Node, dict[str, Tensor]] = {}
    for node in context.graph.graph.find_nodes(op="call_module"):
        module = context.graph.get_submodule(str(node.target))
        names = {id(value): name for name, value in [*module.named_parameters(), *module.named_buffers()]}
        held = {
            names[id(context.tensors[n])]: v for n, v in tensors.items() if id(context.tensors[n]) in names
        }
        if held:
            found[node] = held
    return found


def runner_with(context: Context, tensors: Mapping[str, Tensor], inputs: Any) -> Evaluator:
    """Ready to run a context's graph on one batch, with other values for some parameters or buffers."""
    runner = _Runner(context.graph, _placeholders(context, inputs) | given_by(context, tensors))
    runner.held = modules_of(context, tensors)
    return runner


class Variants:
    """Runs a context's graph with other values for some of its parameters.

    A variant begins at the first node that its parameters reach; what comes before is computed once for all of them.
    Values are freed after their last use.

    Args:
        context: the model, in evaluation mode.
        changes: for each variant, parameters or buffers by name.

    Attributes:
        shared: the nodes whose values no variant changes and some need.
    """

    def __init__(self, context: Context, changes: Sequence[Mapping[str, Tensor]]) -> None:
        self.context = context
        self.given = [given_by(context, own) for own in changes]
        self.modules = [modules_of(context, own) for own in changes]
        graph = context.graph.graph
        (output,) = graph.find_nodes(op="output")
        self._output: fx.Node = output.args[0]
        after = [reached(graph, [*given, *own]) for given, own in zip(self.given, self.modules, strict=True)]
        self._common = [n for n in graph.nodes if n is not output and any(n not in own for own in after)]
        needed = {n for own in after for node in own for n in node.all_input_nodes if n not in own}
        if not all(self._output in own for own in after):
            needed.add(self._output)
        self.shared = tuple(n for n in self._common if n in needed)
        self._common_uses = _last_uses(self._common, needed)
        self._own = [[n for n in own if n not in given] for own, given in zip(after, self.given, strict=True)]
        self._own_uses = [_last_uses(nodes, {self._output}) for nodes in self._own]

    def common(self, inputs: Any) -> Values:
        """What no variant changes and some need, for one batch: the values of the nodes `shared`."""
        runner = _Runner(self.context.graph, _placeholders(self.context, inputs))
        _run(runner, self._common, self._common_uses)
        return runner.env

    def outputs(self, common: Values, inputs: Any) -> Iterator[Tensor]:
        """The output of each variant for one batch, given what they have in common."""
        runner = _Runner(self.context.graph, {})
        for i, (nodes, uses) in enumerate(zip(self._own, self._own_uses, strict=True)):
            runner.env = {**common, **self.given[i]}
            runner.held = self.modules[i]
            _run(runner, nodes, uses)
            yield runner.env[self._output]


def _placeholders(context: Context, inputs: Any) -> dict[fx.Node, Any]:
    nodes = context.graph.graph.find_nodes(op="placeholder")
    return dict(zip(nodes, context.graph.meta["inputs"].tensors(inputs), strict=True))


def reached(graph: fx.Graph, given: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """The nodes of a graph that depend on some of them, and these; the output is none."""
    found = dict.fromkeys(given)
    for node in graph.nodes:
        if node.op != "output" and any(n in found for n in node.all_input_nodes):
            found[node] = None
    return found


class _Runner(Evaluator):
    """Runs modules with other values for what they hold."""

    held: Mapping[fx.Node, Mapping[str, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.held:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return functional_call(self.fetch_attr(str(n.target)), dict(self.held[n]), args, kwargs)


def _run(runner: fx.Interpreter, nodes: Sequence[fx.Node], last: Mapping[fx.Node, list[fx.Node]]) -> None:
    for node in nodes:
        if node.op != "placeholder":
            runner.env[node] = runner.run_node(node)
        for used in last[node]:
            del runner.env[used]


def _last_uses(nodes: Sequence[fx.Node], keep: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By node, those of some nodes that none of the later ones needs, but for those that are kept."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen = set(keep)
    own = set(nodes)
    for node in reversed(nodes):
        free = [n for n in dict.fromkeys((node, *node.all_input_nodes)) if n in own and n not in seen]
        last[node] = free
        seen.update(free)
    return last
