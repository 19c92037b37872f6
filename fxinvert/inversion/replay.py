"""Replay: a graph's values, kept node by node, and its output when one of them is another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

Values = Mapping[fx.Node, Any]


def forward_values(graph: fx.GraphModule, inputs: Values) -> dict[fx.Node, Any]:
    """The value of every node but the output.

    Args:
        graph: any graph.
        inputs: the values of its placeholders.
    """
    runner = fx.Interpreter(graph, garbage_collect_values=False)
    runner.env = dict(inputs)
    for node in graph.graph.nodes:
        if node.op != "output" and node not in runner.env:
            runner.env[node] = runner.run_node(node)
    return runner.env


def output_given(graph: fx.GraphModule, values: Values, node: fx.Node, value: Tensor) -> Tensor:
    """The graph's output with the value of one node replaced; only what depends on it is computed anew.

    Args:
        graph: a graph with one output.
        values: of `forward_values`.
        node: the node whose value is replaced.
        value: `(B, …)`, by this.
    """
    runner = fx.Interpreter(graph, garbage_collect_values=False)
    runner.env = {**values, node: value}
    changed = {node: None}
    for other in graph.graph.nodes:
        if other.op == "output":
            break
        if other is not node and any(n in changed for n in other.all_input_nodes):
            runner.env[other] = runner.run_node(other)
            changed[other] = None
    (output,) = graph.graph.find_nodes(op="output")
    return runner.env[output.args[0]]  # type: ignore[no-any-return]
