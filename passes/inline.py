"""Inline: one of torch's own modules or functions as the functions that it calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxinvert.passes.decompose import DECOMPOSED
from fxinvert.passes.leaves import any_tensor, copied, identifier, leaves, mapped
from fxinvert.rules import key_of

if TYPE_CHECKING:
    from fxinvert.passes.normalize import Builder


def record(
    builder: Builder, called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], path: str
) -> Any:
    """Emits what a call does; None, and nothing emitted, if that cannot be followed.

    Args:
        builder: of the new graph.
        called: one of torch's modules or functions.
        args, kwargs: nodes of the new graph, or literals.
        path: of the module; the op that gives its first result bears it.

    Returns:
        The result, with nodes in place of its tensors.
    """
    # recurrent layers make their first states, of as many rows as there are samples: these are no constants
    recorder = _Recorder(builder, path, isinstance(called, nn.RNNBase | nn.RNNCellBase))
    # copies, one for each: code that is not followed may change its inputs in place
    own: dict[fx.Node, Any] = {}
    values, named = mapped((args, kwargs), lambda n: own.setdefault(n, copied(builder.values[n])))
    for node, value in zip(leaves((args, kwargs)), leaves((values, named)), strict=False):
        if isinstance(value, Tensor):
            recorder.known[id(value)] = node
    with recorder:
        result = recorder.run(called, values, named)
    nodes = recorder.nodes(result)
    first = next((node for node in leaves(nodes) if isinstance(node, fx.Node)), None)
    if first is None or not recorder.complete:
        recorder.undo()
        return None
    if first not in recorder.emitted:  # the module returns its input: keep a node that bears its name
        recorder.undo()
        return builder.called("alias", (first,), {}, path)
    first.meta["path"] = path
    first._rename(identifier(path))
    return nodes


class _Recorder(TorchFunctionMode):
    """Follows a call by the torch functions that it calls, and emits them."""

    def __init__(self, builder: Builder, path: str, sized_by_batch: bool) -> None:
        super().__init__()
        self.builder, self.path, self.sized_by_batch = builder, path, sized_by_batch
        self.known: dict[int, Any] = {}
        self.kept: list[Tensor] = []  # ids are only good while their tensors live
        self.emitted: list[fx.Node] = []
        self.complete = True

    def run(self, called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, its own calls followed."""
        try:
            return DECOMPOSED.get(called, called)(*args, **kwargs)
        except NotImplementedError:
            self.complete = False
            return called(*args, **kwargs)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__":  # a property, as a rule the shape
            return func(*args, **kwargs)
        if not any_tensor((args, kwargs)):
            value = func(*args, **kwargs)
            if self.sized_by_batch or not any_tensor(value):
                return value
        if self.complete and self.builder.takes_apart(func):
            with self:
                return self.run(func, args, kwargs)
        new_args, new_kwargs = self.nodes((args, kwargs))
        if not self.complete:
            return func(*args, **kwargs)
        before = len(self.builder.graph.nodes)
        made = self.builder.called(
            func, new_args, new_kwargs, self.builder.paths.free(f"{self.path}.{key_of(func)}")
        )
        made = self._apart(made, func)
        new = len(self.builder.graph.nodes) - before
        self.emitted += list(islice(reversed(self.builder.graph.nodes), new))[::-1]
        result = self.builder.value_of(made)
        if not any_tensor(result):  # a size, for one
            self.emitted.pop()
            self.builder.graph.erase_node(made)
            return result
        for node, value in zip(leaves(made), leaves(result), strict=True):
            if isinstance(value, Tensor):
                self.known[id(value)] = node
                self.kept.append(value)
        return result

    def _apart(self, made: Any, func: Callable[..., Any]) -> Any:
        """Nodes for the tensors of an op that gives several."""
        value = self.builder.value_of(made)
        if not isinstance(made, fx.Node) or not isinstance(value, tuple | list) or not any_tensor(value):
            return made
        path = f"{self.path}.{key_of(func)}"
        return tuple(
            self.builder.emit(
                "call_function",
                operator.getitem,
                (made, i),
                {},
                self.builder.paths.free(f"{path}.{i}"),
                "getitem",
            )
            for i in range(len(value))
        )

    def undo(self) -> None:
        """Takes back what was emitted."""
        for node in reversed(self.emitted):
            self.builder.graph.erase_node(node)

    def nodes(self, argument: Any) -> Any:
        """An argument or result with nodes in place of its tensors; a tensor without one makes the record incomplete."""
        if isinstance(argument, Tensor):
            node = self.known.get(id(argument))
            if node is None:
                node = self.builder.parameter(argument)
                self.complete = self.complete and node is not None
            return node
        if isinstance(argument, tuple | list):
            kind = tuple if isinstance(argument, tuple) else list
            return kind(self.nodes(a) for a in argument)
        if isinstance(argument, dict):
            return {name: self.nodes(a) for name, a in argument.items()}
        return argument
