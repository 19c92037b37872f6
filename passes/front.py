"""Front: what a model computes with the batch along its second axis, with the batch in front.

Torch's own transformers and recurrent layers compute on `(T, B, …)` unless they are told `batch_first`: none of these values has rows
of a sample, so that they have no targets, and what is computed of them is not trained. What treats positions and samples alike
gives the same on `(B, T, …)`, if the two axes change places in its arguments, too. Whether an op does is tried with its values; in front
of one that does not, and behind it, the axes are exchanged. The graph is compared with the model as any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxinvert.passes.interpreted import Interpreted
from fxinvert.passes.leaves import mapped
from fxinvert.passes.runs import difference

_TRANSPOSE, _PERMUTE = torch.ops.aten.transpose.int, torch.ops.aten.permute.default
#: arguments that name axes
_AXES = ("dim", "dims", "dim0", "dim1")
_EXCHANGED = {0: 1, 1: 0}

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def batch_in_front(graph: fx.GraphModule, values: Mapping[fx.Node, Any]) -> fx.GraphModule | None:
    """A graph that computes with the batch in front wherever it can; None if no parameters are used anywhere else.

    It is a raw graph again, to be normalized and compared with the model.

    Args:
        graph: normalized and checked, so that its nodes are marked with the rows of their samples.
        values: of its nodes, for the example.
    """
    if not any(node.meta.get("behind") and _of_parameters(node) for node in graph.graph.nodes):
        return None
    turning = _Turning(values)
    for node in graph.graph.nodes:
        turning.take(node)
    return Interpreted(graph, turning.graph, type(graph).__name__)


def _of_parameters(node: fx.Node) -> bool:
    return bool(node.meta["active"]) and any(n.op == "get_attr" for n in node.all_input_nodes)


class _Turning:
    """Builds the graph: each value as it was, with the batch in front, or both, as they are asked for."""

    def __init__(self, values: Mapping[fx.Node, Any]) -> None:
        self.values, self.graph = values, fx.Graph()
        self._plain: dict[fx.Node, fx.Node] = {}
        self._front: dict[fx.Node, fx.Node] = {}

    def take(self, node: fx.Node) -> None:
        """Rebuilds the next node."""
        if node.op == "output":
            self.graph.output(map_arg(node.args[0], self._as_it_was))
            return
        turned = any(n.meta.get("behind") for n in (node, *node.all_input_nodes))
        if not (turned and self._exchange(node)) and not (turned and self._try(node)):
            self._plain[node] = self.graph.node_copy(node, self._as_it_was)

    def _as_it_was(self, node: fx.Node) -> fx.Node:
        if node not in self._plain:
            self._plain[node] = self.graph.call_function(_TRANSPOSE, (self._front[node], 0, 1))
        return self._plain[node]

    def _in_front(self, node: fx.Node) -> fx.Node:
        if node not in self._front:
            self._front[node] = self.graph.call_function(_TRANSPOSE, (self._as_it_was(node), 0, 1))
        return self._front[node]

    def _exchange(self, node: fx.Node) -> bool:
        """An exchange of the two axes takes nothing."""
        if not _exchanges(node, self.values):
            return False
        (source,) = node.all_input_nodes
        if node.meta.get("behind"):
            self._front[node] = self._as_it_was(source)
        else:
            self._plain[node] = self._in_front(source)
        return True

    def _try(self, node: fx.Node) -> bool:
        """Rebuilds an op on what has the batch in front, if it gives the same."""
        expected, behind = self.values[node], bool(node.meta.get("behind"))
        inputs = {n for n in node.all_input_nodes if n.meta.get("behind")}
        if (
            not inputs
            or not isinstance(node.target, torch._ops.OpOverload)
            or not isinstance(expected, Tensor)
        ):
            return False
        if behind:
            expected = expected.transpose(0, 1)
        # such as positions, which are the same for all samples
        others = {n for n in node.all_input_nodes if _has_both_axes(self.values[n])}
        rank = max(self.values[n].dim() for n in inputs)
        for (args, kwargs), front in itertools.product(_named(node, rank), (inputs, inputs | others)):
            given, named = mapped((args, kwargs), self._value_in(front))
            try:
                found = node.target(*given, **named)
            except (RuntimeError, IndexError):  # it takes none of this shape
                continue
            if difference(expected, found) is None:
                place = self._place_in(front)
                made = self.graph.node_copy(node, place)
                made.args, made.kwargs = map_arg((args, kwargs), place)
                (self._front if behind else self._plain)[node] = made
                return True
        return False

    def _value_in(self, front: set[fx.Node]) -> Callable[[fx.Node], Any]:
        return lambda n: self.values[n].transpose(0, 1) if n in front else self.values[n]

    def _place_in(self, front: set[fx.Node]) -> Callable[[fx.Node], fx.Node]:
        return lambda n: self._in_front(n) if n in front else self._as_it_was(n)


def _exchanges(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether an op does no more than to exchange the first two axes."""
    if node.target is _TRANSPOSE:
        return {axis % values[node].dim() for axis in node.args[1:]} == {0, 1}
    rank = values[node].dim() if node.target is _PERMUTE else 0
    return rank > 1 and [axis % rank for axis in node.args[1]] == [1, 0, *range(2, rank)]  # type: ignore[operator, union-attr]


def _has_both_axes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 2


def _named(node: fx.Node, rank: int) -> Iterator[Arguments]:
    """The arguments of an op as they are, and with the two axes exchanged where it names them, of values with so many."""
    yield node.args, node.kwargs

    def exchanged(name: str, given: Any) -> Any:
        if name not in _AXES:
            return given
        if isinstance(given, int):
            return _EXCHANGED.get(given % rank, given)
        return [exchanged(name, axis) for axis in given] if isinstance(given, list | tuple) else given

    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    args = tuple(exchanged(a.name, given) for a, given in zip(arguments, node.args, strict=False))
    kwargs = {name: exchanged(name, given) for name, given in node.kwargs.items()}
    for left in arguments[len(args) :]:
        if left.name in _AXES and left.name not in kwargs and left.has_default_value():
            kwargs[left.name] = exchanged(left.name, left.default_value)
    if (args, kwargs) != (node.args, node.kwargs):
        yield args, kwargs
