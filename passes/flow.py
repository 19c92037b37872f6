"""Flow: how values that depend on the model's input reach its output, and from where each gets its target.

In the graph of the values that depend on the input, a value's target follows from that of its nearest *post-dominator*,
the first value that every path from it to the output passes (Cooper, Harvey & Kennedy 2001, as in networkx). Where the
two are one op apart, the op is inverted by its rule, its other operands held at their anchors. Where paths part and meet
again in between, they bound a *region*: single-entry, single-exit, the smallest that holds the branching, and inverted
as a whole. What pads or repeats the map of a convolution is one affine op with it (`copies.py`). Dominators, likewise, are the values that every path from input to output passes: the possible cuts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from fxinvert.errors import NoRuleError
from fxinvert.passes.activity import followed
from fxinvert.passes.capture import no_path
from fxinvert.passes.copies import run_from
from fxinvert.passes.leaves import leaves

#: stands before everything that the paths start at
_SOURCE = "source"


@dataclass(frozen=True)
class Stretch:
    """From where a value gets its target.

    Attributes:
        entry: the value.
        exit: the value whose target it follows from.
        inside: what lies between the two, in graph order; without it, and taken once, `exit` is the op that is inverted.
    """

    entry: fx.Node
    exit: fx.Node
    inside: tuple[fx.Node, ...]

    @property
    def is_region(self) -> bool:
        """Whether paths part and meet again between entry and exit."""
        if self.copies:
            return False
        return bool(self.inside) or leaves((self.exit.args, self.exit.kwargs)).count(self.entry) > 1

    @property
    def copies(self) -> bool:
        """Whether what lies between pads or repeats the entry for the convolution at the exit, and they are one op."""
        return bool(self.inside) and run_from(self.inside[0]) == [*self.inside, self.exit]


class Flow:
    """The values that depend on the model's input and that its output depends on.

    Attributes:
        exit: the supervised output.
        nodes: in graph order.
        sources: those that nothing else leads to.

    Raises:
        NoRuleError: the output does not depend on the input.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        (output,) = graph.graph.find_nodes(op="output")
        self.exit: fx.Node = output.args[0]
        if not self.exit.meta["active"] or not has_target(self.exit):
            raise NoRuleError(no_path(graph))
        needed = {self.exit}
        for node in reversed(graph.graph.nodes):
            if node in needed:
                needed.update(followed(node))
        self.nodes = [node for node in graph.graph.nodes if node in needed]
        self.sources: list[fx.Node] = []
        self._edges: list[tuple[Any, fx.Node]] = []
        for node in self.nodes:
            inputs: list[Any] = [*followed(node)]
            if not inputs:
                self.sources.append(node)
            self._edges += [(n, node) for n in inputs or [_SOURCE]]

    @property
    def line(self) -> list[fx.Node]:
        """The values that every path from input to output passes, input first."""
        return list(self._chain(_dominators(self._edges, _SOURCE), self.exit))[::-1]

    @property
    def branches(self) -> bool:
        """Whether paths part and meet again anywhere."""
        return any(stretch.is_region for stretch in self.stretches)

    @property
    def size(self) -> int:
        """How many numbers each row of the output has."""
        return math.prod(self.exit.meta["tensor_meta"].shape[1:])

    @functools.cached_property
    def stretches(self) -> list[Stretch]:
        """How every value but the output gets its target; those nearest the output first."""
        after = _dominators(((user, node) for node, user in self._edges), self.exit)
        found = []
        for i, node in reversed(list(enumerate(self.nodes))):
            if node is self.exit or not has_target(node):
                continue
            exit_ = next(n for n in self._chain(after, node) if n is not node)
            inside = tuple(self._between(i, exit_))
            run = [] if inside or exit_ is self.exit else run_from(exit_)
            found.append(Stretch(node, run[-1], tuple(run[:-1])) if run else Stretch(node, exit_, inside))
        return found

    def _chain(self, dominator: dict[Any, Any], node: fx.Node) -> Iterator[fx.Node]:
        """A node and its dominators, the nearest first, as far as they can have a target."""
        while True:
            if has_target(node):
                yield node
            following = dominator.get(node, node)
            if following is node or following == _SOURCE or following is None:
                return
            node = following

    def _between(self, index: int, exit_: fx.Node) -> Iterator[fx.Node]:
        """What depends on the node with this index, up to the node that all of it leads to."""
        seen = {self.nodes[index]}
        for node in self.nodes[index + 1 :]:
            if node is exit_:
                return
            if not seen.isdisjoint(followed(node)):
                seen.add(node)
                yield node


def _dominators(edges: Iterable[tuple[Any, Any]], start: Any) -> dict[Any, Any]:
    """Each node's nearest dominator: the last node that every path from the start to it passes."""
    import networkx as nx  # here, as importing it takes as long as importing all of this package

    found: dict[Any, Any] = nx.immediate_dominators(nx.DiGraph(edges), start)
    return found


def has_target(node: fx.Node) -> bool:
    """Whether a node's value can have a target: a single real floating-point tensor, samples along its first axis."""
    meta = node.meta.get("tensor_meta")
    return isinstance(meta, TensorMetadata) and meta.dtype.is_floating_point and node.meta["rows"] > 0


def by_sample(node: fx.Node, value: Tensor) -> Tensor:
    """A node's value, all that belongs to a sample in one row: `(B·k, …)` → `(B, n)`."""
    rows, rest = int(node.meta["rows"]), math.prod(value.shape[1:])
    return value.reshape(len(value) // rows, rows * rest)
