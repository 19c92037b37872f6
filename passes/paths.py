"""Paths: the names by which users know ops, no two of them the same."""

from __future__ import annotations

from itertools import count

from torch import fx


class Paths:
    """The paths of the ops of a graph that is rebuilt.

    Args:
        raw: the graph as captured, whose modules own their paths: other ops give way.

    Attributes:
        scope: the module in whose forward the op at hand stands; "" for the model's own.
    """

    def __init__(self, raw: fx.GraphModule) -> None:
        self.scope = ""
        self._taken: set[str] = set()
        self._reserved = {str(n.target) for n in raw.graph.nodes if n.op in ("call_module", "get_attr")}

    def take(self, path: str) -> str:
        """The path, taken whether it is free or not."""
        self._taken.add(path)
        return path

    def of_module(self, path: str) -> str:
        """A free path for an op that a module stands for; when it is called again `act@2`, `act@3`, …"""
        numbered = (path if i == 1 else f"{path}@{i}" for i in count(1))
        return self.take(next(p for p in numbered if p not in self._taken))

    def free(self, path: str) -> str:
        """A free path for any other op: the path, `path_1`, `path_2`, …"""
        numbered = (path if i == 0 else f"{path}_{i}" for i in count())
        return self.take(next(p for p in numbered if p not in self._taken and p not in self._reserved))

    def of_op(self, key: str) -> str:
        """A free path for an op without a name of its own: its key, in the scope of its module."""
        name = key if key.isidentifier() else key.split(".")[-1]
        return self.free(f"{self.scope}.{name}" if self.scope else name)


def scope_of(node: fx.Node) -> str:
    """The path of the innermost module in whose forward a raw node stands; "" for the model's own."""
    own = {str(node.target)} if node.op == "call_module" else set()
    stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    known = node.meta.get("scope")
    return known if known is not None else ([path for path in stack if path not in own] or [""])[-1]
