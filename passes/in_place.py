"""In place: the rebuilt op returns a new tensor instead, which is right only where nobody reads the changed one later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx

from fxinvert.passes.calls import shares_memory
from fxinvert.passes.capture import CaptureError, describe
from fxinvert.passes.spelling import is_in_place


def check_in_place(
    node: fx.Node, raw: fx.GraphModule, before: Iterable[fx.Node], value_of: Callable[[fx.Node], Any]
) -> None:
    """Refuses an op that changes a value in place which another op reads afterwards, by this name or by that of a view.

    Args:
        node: of the raw graph.
        raw: that graph.
        before: the nodes that have been run.
        value_of: gives their values.

    Raises:
        CaptureError: it is one; the message names both ops.
    """
    changed = node.args[0] if node.args else None
    if node.op == "call_module":
        in_place = bool(getattr(raw.get_submodule(str(node.target)), "inplace", False))
    else:
        in_place = is_in_place(node.target, node.args, node.kwargs)
    if not in_place or not isinstance(changed, fx.Node):
        return
    shared = {n for n in before if shares_memory(value_of(n), value_of(changed))}
    for later in _after(node):
        if shared.intersection(later.all_input_nodes):
            raise CaptureError(
                f"{describe(node)} changes its input in place, and {describe(later)} reads it afterwards; "
                "use the op that returns a new tensor"
            )


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node
