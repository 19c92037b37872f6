"""Inline: one of torch's own modules as the functions that its forward calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxinvert.passes.leaves import any_tensor, copied, identifier, leaves
from fxinvert.rules import key_of

if TYPE_CHECKING:
    from fxinvert.passes.normalize import Builder


def record(
    builder: Builder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str
) -> fx.Node | None:
    """Emits what a module's forward does; None, and nothing emitted, if that cannot be followed.

    Args:
        builder: of the new graph.
        module: one of torch's modules.
        args, kwargs: nodes of the new graph, or literals.
        path: of the module; the op that gives its result bears it.
    """
    recorder = _Recorder(builder, path)
    # copies: code that is not followed may change its inputs in place
    values, named = copied(builder.value_of((args, kwargs)))
    for node, value in zip(leaves((args, kwargs)), leaves((values, named)), strict=False):
        if isinstance(value, Tensor):
            recorder.known[id(value)] = node
    with recorder:
        result = module(*values, **named)
    node = recorder.known.get(id(result))
    if node is None or not recorder.complete:
        recorder.undo()
        return None
    if node not in recorder.emitted:  # the module returns its input: keep a node that bears its name
        recorder.undo()
        return builder.called("alias", (node,), {}, path)  # type: ignore[no-any-return]
    node.meta["path"] = path
    node._rename(identifier(path))
    return node


class _Recorder(TorchFunctionMode):
    """Follows a module's forward by the torch functions that it calls, and emits them."""

    def __init__(self, builder: Builder, path: str) -> None:
        super().__init__()
        self.builder, self.path = builder, path
        self.known: dict[int, fx.Node] = {}
        self.kept: list[Tensor] = []  # ids are only good while their tensors live
        self.emitted: list[fx.Node] = []
        self.complete = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any_tensor((args, kwargs)) or func.__name__ == "__get__":  # a property, as a rule the shape
            return func(*args, **kwargs)
        new_args, new_kwargs = self._nodes((args, kwargs))
        if not self.complete:
            return func(*args, **kwargs)
        node = self.builder.called(
            func, new_args, new_kwargs, self.builder.unique(f"{self.path}.{key_of(func)}", "_")
        )
        self.emitted.append(node)
        result = self.builder.values[node]
        if isinstance(result, Tensor):
            self.known[id(result)] = node
            self.kept.append(result)
        elif not any_tensor(result):  # the node of several tensors stays, though they are not known apart
            self.emitted.pop()
            self.builder.graph.erase_node(node)
        return result

    def undo(self) -> None:
        """Takes back what was emitted."""
        for node in reversed(self.emitted):
            self.builder.graph.erase_node(node)

    def _nodes(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            node = self.known.get(id(argument))
            if node is None:
                node = self.builder.parameter(argument)
                self.complete = self.complete and node is not None
            return node
        if isinstance(argument, tuple | list):
            kind = tuple if isinstance(argument, tuple) else list
            return kind(self._nodes(a) for a in argument)
        if isinstance(argument, dict):
            return {name: self._nodes(a) for name, a in argument.items()}
        return argument
