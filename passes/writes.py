"""Writes: in-place ops of exported graphs as ops that return new values, also where others read the tensor afterwards.

`torch.export` keeps `scores[:, 1:] += bias` as it is: a view of the scores is changed, and the scores are read later.
Written out, the changed view is put back into a copy of what it is a view of, and what reads that later reads the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.passes.written import Written

aten = torch.ops.aten

#: views, and how a changed view is put back: (what it is a view of, its new value, the other arguments) → op, arguments
_PUT_BACK: dict[Any, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    aten.slice.Tensor: lambda whole, part, *rest: (aten.slice_scatter.default, (whole, part, *rest)),
    aten.select.int: lambda whole, part, *rest: (aten.select_scatter.default, (whole, part, *rest)),
    aten.transpose.int: lambda whole, part, *axes: (aten.transpose.int, (part, *axes)),
    aten.view.default: lambda whole, part, size: (aten.view_as.default, (part, whole)),
    aten.unsqueeze.default: lambda whole, part, axis: (aten.squeeze.dim, (part, axis)),
    aten.alias.default: lambda whole, part: (aten.alias.default, (part,)),
    aten.detach.default: lambda whole, part: (aten.alias.default, (part,)),
}
#: those of them that take an axis next, and are put back along it
_BY_AXIS = (aten.slice.Tensor, aten.select.int)


def without_writes(raw: fx.GraphModule) -> None:
    """Rewrites the in-place ops of a graph after which others read what they have changed.

    Those on constants (see `written.py`), and those without an op that returns a new value, stay.
    """
    constants = Written(raw).nodes
    for node in list(raw.graph.nodes):
        if node.target is aten.copy.default:  # what is left of `copy_` by torch's own functionalization
            node.replace_all_uses_with(_copied(node, _Adding(raw.graph, node)))
            raw.graph.erase_node(node)
            continue
        function = _functional(node.target)
        if function is None or node in constants or not isinstance(node.args[0], fx.Node):
            continue
        views = list(_views(node.args[0]))
        order = {n: i for i, n in enumerate(raw.graph.nodes)}
        if any(order[user] > order[node] for view in views for user in view.users):
            _rewrite(raw.graph, node, function, views, order)
    raw.graph.lint()


def _rewrite(
    graph: fx.Graph, node: fx.Node, function: Any, views: list[fx.Node], order: dict[fx.Node, int]
) -> None:
    add = _Adding(graph, node)
    copies = function is aten.copy.default
    changed = _copied(node, add) if copies else add(function, node.args, node.kwargs)
    node.replace_all_uses_with(changed)
    part = changed
    for view, whole in zip(views, [*views[1:], None], strict=True):
        for user in [u for u in view.users if order.get(u, -1) > order[node]]:
            user.replace_input_with(view, part)
        if whole is not None:
            part = _put_back(view, whole, part, add)
    graph.erase_node(node)


def _put_back(view: fx.Node, whole: fx.Node, part: fx.Node, add: Callable[..., fx.Node]) -> fx.Node:
    """What a view is of, after the view has become `part`; complex values as pairs of real ones: torch has no derivative else."""
    value, rest = view.meta.get("val"), view.args[1:]
    if view.target not in _BY_AXIS or not isinstance(value, Tensor) or not value.is_complex():
        return add(*_PUT_BACK[view.target](whole, part, *rest))
    axis = rest[0] if rest else 0
    assert isinstance(axis, int)
    pairs = (add(aten.view_as_real.default, (x,)) for x in (whole, part))
    changed = _PUT_BACK[view.target](*pairs, axis if axis >= 0 else axis - 1, *rest[1:])
    return add(aten.view_as_complex.default, (add(*changed),))


class _Adding:
    """Adds ops behind a node, one after the other."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.last = graph, node
        self.meta = {k: v for k, v in node.meta.items() if k in ("scope", "stack_trace")}

    def __call__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(op, args, kwargs)
        self.last.meta = dict(self.meta)
        return self.last


def _copied(node: fx.Node, add: Callable[..., fx.Node]) -> fx.Node:
    """What `copy` gives, and `copy_` leaves in its first argument: the second one, in its shape and dtype."""
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)
    assert isinstance(source, fx.Node)
    new, old = source.meta.get("val"), target.meta.get("val")
    if not isinstance(new, Tensor) or not isinstance(old, Tensor) or new.dtype != old.dtype:
        source = add(aten.type_as.default, (source, target))
    return add(aten.expand_as.default, (source, target))


def _functional(target: Any) -> Any:
    """The op that returns what an in-place one leaves in its first argument; None if it is not in place."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    packet = getattr(aten, target._schema.name.split("::")[1].removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """A node, what it is a view of, and so on."""
    yield node
    while node.target in _PUT_BACK and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
