"""Rest: a model from one of its nodes on, as it is or with its kinks rounded off.

A ReLU is a kink, and dead on one side. Rounded off (Chen & Mangasarian, Comput. Optim. Appl. 5, 1996),

    max(x, 0)  →  (x + √(x² + 4w²)) / 2,

it has a slope everywhere, and differs by w at most. Functions made of ReLUs follow: LeakyReLU, hardtanh and ReLU6. The
width w is in units of the spread (standard deviation) of the op's own input in the sample, at the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from fxinvert.inversion.replay import forward_values, placeholders_of
from fxinvert.linalg.vectors import per_sample
from fxinvert.passes.flow import by_sample


def softened_relu(x: Tensor, width: Tensor) -> Tensor:
    """max(x, 0), rounded off."""
    return (x + (x.square() + 4 * width.square()).sqrt()) / 2


def _leaky(x: Tensor, width: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * x + (1 - negative_slope) * softened_relu(x, width)


def _hardtanh(x: Tensor, width: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return min_val + softened_relu(x - min_val, width) - softened_relu(x - max_val, width)


#: ops with kinks, rounded off: their input, the width, and their other arguments
SOFTENED: dict[str, Callable[..., Tensor]] = {
    "relu": softened_relu,
    "leaky_relu": _leaky,
    "hardtanh": _hardtanh,
}


class Rest:
    """The model from a node on: the node's value to the output, `(B, …)` → `(B, n)`, the rest of the pass held.

    Args:
        graph: a graph with one output.
        values: of its forward pass.
        node: where to start.

    Attributes:
        exit: the output's node.
        following: the nodes that depend on `node`, in graph order.
    """

    def __init__(self, graph: fx.GraphModule, values: Mapping[fx.Node, Any], node: fx.Node) -> None:
        self.graph, self.values, self.node = graph, values, node
        (output,) = graph.graph.find_nodes(op="output")
        self.exit: fx.Node = output.args[0]
        self.following: list[fx.Node] = []
        changed = {node}
        for other in graph.graph.nodes:
            if other.op != "output" and other is not node and not changed.isdisjoint(other.all_input_nodes):
                changed.add(other)
                self.following.append(other)
        self._spread = {
            n: by_sample(n, values[n.all_input_nodes[0]]).std(1)
            for n in self.following
            if n.meta.get("op") in SOFTENED
        }

    @property
    def has_kinks(self) -> bool:
        """Whether there is anything to round off."""
        return bool(self._spread)

    def of(self, rows: Tensor) -> Rest:
        """The same for some samples `(k,)` only."""
        some = placeholders_of(self.graph, self.values, rows)
        return Rest(self.graph, forward_values(self.graph, some), self.node)

    def __call__(self, value: Tensor, width: float = 0.0) -> Tensor:
        """The output from another value of the node, with kinks rounded off as wide as `width`."""
        runner = fx.Interpreter(self.graph, garbage_collect_values=False)
        runner.env = {**self.values, self.node: value.reshape(self.values[self.node].shape)}
        for node in self.following:
            if width and node in self._spread:
                runner.env[node] = self._softened(runner, node, width * self._spread[node])
            else:
                runner.env[node] = runner.run_node(node)
        return by_sample(self.exit, runner.env[self.exit])

    def _softened(self, runner: fx.Interpreter, node: fx.Node, widths: Tensor) -> Tensor:
        (x, *args), kwargs = runner.fetch_args_kwargs_from_env(node)
        widths = per_sample(widths.repeat_interleave(len(x) // len(widths)), x)
        return SOFTENED[node.meta["op"]](x, widths.to(x.dtype), *args, **kwargs)
