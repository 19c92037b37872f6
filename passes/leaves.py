"""Small tools for nested arguments, and for modules that a graph keeps whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_is_leaf, tree_map


def mapped(argument: Any, value: Callable[[fx.Node], Any]) -> Any:
    """An argument with every node replaced; unlike fx's `map_arg` it gives plain containers, tensors included."""
    if isinstance(argument, fx.Node):
        return value(argument)
    if isinstance(argument, tuple | list):
        kind = tuple if isinstance(argument, tuple) else list
        return kind(mapped(a, value) for a in argument)
    if isinstance(argument, dict):
        return {name: mapped(a, value) for name, a in argument.items()}
    if isinstance(argument, slice):
        return slice(*(mapped(a, value) for a in (argument.start, argument.stop, argument.step)))
    return argument


def leaves(argument: Any) -> list[Any]:
    """What a nested argument holds, containers opened."""
    if isinstance(argument, tuple | list):
        return [leaf for a in argument for leaf in leaves(a)]
    if isinstance(argument, dict):
        return [leaf for a in argument.values() for leaf in leaves(a)]
    return [argument]


def copied(argument: Any) -> Any:
    """The same with every tensor cloned, for code that may change what it is given."""
    if isinstance(argument, Tensor):
        return argument.clone()
    if type(argument) in (tuple, list):
        return type(argument)(map(copied, argument))
    if tree_is_leaf(argument):
        return argument
    return tree_map(copied, argument, is_leaf=lambda value: value is not argument)


def printable(module: fx.GraphModule) -> fx.GraphModule:
    """Gives a graph module, whose class is its own, the method `print_tabular()` of its graph."""
    type(module).print_tabular = lambda self: self.graph.print_tabular()  # type: ignore[attr-defined]
    return module


def any_tensor(argument: Any) -> bool:
    """Whether a nested argument holds a tensor."""
    if isinstance(argument, tuple | list):
        return any(map(any_tensor, argument))
    if isinstance(argument, dict):
        return any(map(any_tensor, argument.values()))
    return isinstance(argument, Tensor)


def identifier(path: str) -> str:
    """A node's name for a path: `layer1.0.conv` → `layer1_0_conv`."""
    return re.sub(r"\W", "_", path)


def evaluation_copy(module: nn.Module) -> nn.Module:
    """A module in evaluation mode with the same parameters and buffers, not copies of them, but a mode of its own."""
    twin = module.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin)["training"] = False
    vars(twin)["_modules"] = {n: m and evaluation_copy(m) for n, m in module._modules.items()}
    return twin
