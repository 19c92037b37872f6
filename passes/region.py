"""Region: a stretch of the graph as a graph of its own, a function of the value at its entry."""

from __future__ import annotations

from torch import fx, nn

from fxinvert.passes.flow import Stretch
from fxinvert.passes.leaves import mapped, printable


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
    """The region as a graph module: `(entry, *held)` → exit; its `hinged` tells whether all that follows is a ReLU."""
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
    region = printable(fx.GraphModule(root, graph, "Region"))
    vars(region)["hinged"] = [n.meta.get("op") for n in stretch.exit.users] == ["relu"]
    return region
