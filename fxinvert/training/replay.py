"""Replay with other parameters: what depends on them is computed anew, with gradients; the rest is taken as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F

from fxinvert.passes.capture import attribute
from fxinvert.training.context import Context

#: positions of the arguments of aten.batch_norm
_MEAN, _VARIANCE, _TRAINING = 3, 4, 5


def leaves_of(context: Context, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of parameters, by name, that gradients are kept for; the model's own stay as they are."""
    return {name: context.tensors[name].detach().clone().requires_grad_() for name in names}


def replay(
    context: Context,
    values: Mapping[fx.Node, Any],
    given: Mapping[fx.Node, Any],
    last: fx.Node,
    *,
    training: bool = False,
) -> dict[fx.Node, Any]:
    """The values of all nodes up to `last`, some of them given.

    Args:
        context: the model.
        values: of a forward pass.
        given: what replaces some of them; only what depends on these is computed.
        last: where to end.
        training: whether batch norm uses the statistics of the batch, and moves those given for its buffers.
    """
    runner = _Trainer(context.graph) if training else fx.Interpreter(context.graph)
    runner.garbage_collect_values = False
    runner.env = {**values, **given}
    changed = set(given)
    for node in context.graph.graph.nodes:
        if node not in changed and any(n in changed for n in node.all_input_nodes) and node.op != "output":
            runner.env[node] = runner.run_node(node)
            changed.add(node)
        if node is last:
            break
    return runner.env


def training_graph(context: Context) -> fx.GraphModule:
    """A copy of the graph, on the same parameters, in which batch norm uses the statistics of the batch."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(context.graph.graph, {}))
    for node in graph.nodes:
        if node.meta.get("op") == "batch_norm":
            node.update_arg(_TRAINING, isinstance(node.args[_MEAN], fx.Node) or node.args[_TRAINING])
    return fx.GraphModule(context.graph, graph)


def batch_norms(context: Context) -> list[fx.Node]:
    """The nodes that normalize by running statistics."""
    return [
        node
        for node in context.graph.graph.nodes
        if node.meta.get("op") == "batch_norm" and isinstance(node.args[_MEAN], fx.Node)
    ]


def statistics_of(context: Context, node: fx.Node) -> tuple[str, str]:
    """The names of the running mean and variance of a batch norm."""
    names = {id(value): name for name, value in context.tensors.items()}
    mean, variance = (attribute(context.graph, str(node.args[i].target)) for i in (_MEAN, _VARIANCE))  # type: ignore[union-attr]
    return names[id(mean)], names[id(variance)]


class _Trainer(fx.Interpreter):
    """Runs batch norm as in training."""

    def run_node(self, n: fx.Node) -> Any:
        if n.meta.get("op") != "batch_norm":
            return super().run_node(n)
        x, weight, bias, mean, variance, _, momentum, eps, *_ = self.fetch_args_kwargs_from_env(n)[0]
        return F.batch_norm(x, mean, variance, weight, bias, True, momentum, eps)
