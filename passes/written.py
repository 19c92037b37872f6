"""Written: constants that a graph fills in place, such as the masks of shifted windows, computed once.

What a graph writes into is usually a value that others read (refused, see `in_place.py`). A tensor that is made of
numbers alone, by `zeros` or `arange`, and then filled piece by piece is not: it is the same in every run, and becomes a
constant of the graph.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxinvert.passes.capture import attribute
from fxinvert.passes.leaves import leaves, mapped
from fxinvert.passes.spelling import is_in_place

#: ops that make a tensor of numbers
_MADE_OF_NUMBERS = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
#: the same, as methods of a tensor that gives no more than its dtype
_NEW = tuple(f"new_{name}" for name in _MADE_OF_NUMBERS)
#: in the `meta` of a raw node that reads an attribute: its value is neither a parameter nor a buffer of the user's
CONSTANT = "constant"


class Written:
    """The constants of a raw graph, if some of them are written into.

    Attributes:
        nodes: raw nodes that are computed from numbers alone; none if nothing is written into them.
        values: of those that have been run.
    """

    def __init__(self, raw: fx.GraphModule) -> None:
        self.raw = raw
        self.nodes: set[fx.Node] = set()
        for node in raw.graph.nodes:
            if _is_constant(node, self.nodes):
                self.nodes.add(node)
        if not any(node.args and is_in_place(node.target, node.args, node.kwargs) for node in self.nodes):
            self.nodes = set()
        self.values: dict[fx.Node, Any] = {}

    def run(self, node: fx.Node, prototypes: Any) -> None:
        """Computes one of the nodes.

        Args:
            node: the raw node; those before it have been run.
            prototypes: the value of a raw node that is not among the constants.
        """

        def value(n: fx.Node) -> Any:
            return self.values[n] if n in self.nodes else prototypes(n)

        args, kwargs = mapped((node.args, node.kwargs), value)
        if node.op == "get_attr":
            self.values[node] = attribute(self.raw, str(node.target)).clone()
        elif node.op == "call_method":
            self.values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            self.values[node] = node.target(*args, **kwargs)


def _is_constant(node: fx.Node, constants: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return bool(node.meta.get(CONSTANT))
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    rest = leaves((node.args[1:] if name in _NEW else node.args, node.kwargs))
    read = [leaf for leaf in rest if isinstance(leaf, fx.Node)]
    return constants.issuperset(read) and (bool(read) or name in _NEW + _MADE_OF_NUMBERS)
