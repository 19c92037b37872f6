"""Replay: a graph's values, kept node by node, and its output when one of them is another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.passes.folded import differentiated
from fxinvert.passes.interpreted import Runner
from fxinvert.passes.inverse_op import call_arguments
from fxinvert.rules.pooling import tile_maxima
from fxinvert.rules.windows import each, sliding

Values = Mapping[fx.Node, Any]

_AXES = {"max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3}


class Evaluator(Runner):
    """Runs nodes of a graph, and keeps what they give, in `env`.

    Where no gradients are asked for, maxima over tiles are found slice by slice, which gives the same numbers. Torch's own
    kernel for processors looks for their places too, and takes ten to twenty times as long: as long as convolutions.
    """

    def __init__(self, graph: fx.GraphModule, env: Values) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.env = dict(env)

    def run_node(self, n: fx.Node) -> Any:
        axes = _AXES.get(n.meta.get("op", ""))
        if axes is None or torch.is_grad_enabled():
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = call_arguments(n.target, args, kwargs)
        window, value = sliding(each(given["kernel_size"], axes), given), given["self"]
        if not window.tiles or given["ceil_mode"] or value.device.type != "cpu":
            return super().run_node(n)
        return tile_maxima(value, window.kernel)

    def differentiable(self, node: fx.Node, following: Collection[fx.Node]) -> Any:
        """What a node gives, to be differentiated in what follows from some node, and in nothing else."""
        called = differentiated(node, following)
        if called is node.target:
            return self.run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return called(*args, **kwargs)


def forward_values(graph: fx.GraphModule, inputs: Values) -> dict[fx.Node, Any]:
    """The value of every node but the output.

    Args:
        graph: any graph.
        inputs: the values of its placeholders.
    """
    runner = Evaluator(graph, inputs)
    for node in graph.graph.nodes:
        if node.op != "output" and node not in runner.env:
            runner.env[node] = runner.run_node(node)
    return runner.env


def placeholders_of(graph: fx.GraphModule, values: Values, samples: Tensor) -> dict[fx.Node, Any]:
    """The values of the placeholders for some samples, `(k,)`, only."""
    given = {n: values[n] for n in graph.graph.find_nodes(op="placeholder")}
    batch = next(len(v) // int(n.meta["rows"]) for n, v in given.items() if n.meta["rows"])
    return {
        n: v.unflatten(0, (batch, -1))[samples].flatten(0, 1) if n.meta["rows"] else v
        for n, v in given.items()
    }


def output_given(graph: fx.GraphModule, values: Values, node: fx.Node, value: Tensor) -> Tensor:
    """The graph's output with the value of one node replaced; only what depends on it is computed anew, to be differentiated in it.

    Args:
        graph: a graph with one output.
        values: of `forward_values`.
        node: the node whose value is replaced.
        value: `(B, …)`, by this.
    """
    runner = Evaluator(graph, {**values, node: value})
    changed = {node: None}
    for other in graph.graph.nodes:
        if other.op == "output":
            break
        if other is not node and any(n in changed for n in other.all_input_nodes):
            runner.env[other] = (
                runner.differentiable(other, changed) if torch.is_grad_enabled() else runner.run_node(other)
            )
            changed[other] = None
    (output,) = graph.graph.find_nodes(op="output")
    return runner.env[output.args[0]]  # type: ignore[no-any-return]
