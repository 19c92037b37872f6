"""Region: a stretch of the graph as a function of the value at its entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxinvert.passes.flow import Stretch
from fxinvert.passes.folded import differentiate, fold_normalizations
from fxinvert.passes.leaves import mapped, printable


class Region(nn.Module):
    """A stretch of the graph as a module: `(entry, *held)` → exit.

    Its graph is made when it is first asked for: where regions nest, each of them holds all those inside it, and many
    are never called.

    Args:
        stretch: the region.

    Attributes:
        hinged: whether all that follows is a ReLU.
        entrywise: whether every value goes its own way.
    """

    def __init__(self, stretch: Stretch, entrywise: bool = False) -> None:
        super().__init__()
        self._stretch: Stretch | None = stretch
        self._interior: fx.GraphModule | None = None
        self.hinged = [n.meta.get("op") for n in stretch.exit.users] == ["relu"]
        self.entrywise = entrywise

    @property
    def interior(self) -> fx.GraphModule:
        """The region as a graph."""
        if self._interior is None:
            assert self._stretch is not None
            self._interior = region_graph(self._stretch)
        return self._interior

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The interior's, so that arguments go by its names."""
        return self.interior.forward

    def print_tabular(self) -> None:
        """Prints the interior, a node a line."""
        self.interior.graph.print_tabular()

    def __getstate__(self) -> dict[str, Any]:
        _ = self.interior  # made now: the graph around it is not saved with it
        return self.__dict__ | {"_stretch": None}


def owner_of(node: fx.Node) -> fx.GraphModule:
    """The module of a node's graph."""
    owner = node.graph.owning_module
    assert owner is not None, "a graph outside of its module"
    return owner


def held(stretch: Stretch) -> list[fx.Node]:
    """The values from outside that a region's ops read beside its entry, parameters among them; in graph order of use."""
    own = {stretch.entry, *stretch.inside}
    read = (n for node in (*stretch.inside, stretch.exit) for n in node.all_input_nodes)
    return list(dict.fromkeys(n for n in read if n not in own))


def region_graph(stretch: Stretch) -> fx.GraphModule:
    """The region as a graph module: `(entry, *held)` → exit, normalizations folded into convolutions, kernels held."""
    graph, root = fx.Graph(), nn.Module()
    owner = owner_of(stretch.exit)
    nodes = {n: graph.placeholder(n.name) for n in (stretch.entry, *held(stretch))}
    for node in (*stretch.inside, stretch.exit):
        target = node.target
        if node.op == "call_module":
            target = node.name
            root.add_module(target, owner.get_submodule(str(node.target)))
        args, kwargs = mapped((node.args, node.kwargs), nodes.__getitem__)
        nodes[node] = graph.create_node(node.op, target, args, kwargs, name=node.name)
    graph.output(nodes[stretch.exit])
    fold_normalizations(graph)
    differentiate(graph, nodes[stretch.entry])
    return printable(fx.GraphModule(root, graph, "Region"))
