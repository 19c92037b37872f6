"""Capture: from a model to a raw torch.fx graph, the model left as it was found."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from fxinvert.errors import TraceError
from fxinvert.rules import RuleSet


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the body with every module in evaluation mode, then restores each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Tracer(fx.Tracer):
    """Keeps torch's own modules and those with a rule of their own whole."""

    def __init__(self, rules: RuleSet) -> None:
        super().__init__(autowrap_functions=tuple(rules.whole_functions))
        self.rules = rules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.rules.keeps_whole(type(m)) or super().is_leaf_module(m, module_qualified_name)


def capture(model: nn.Module, rules: RuleSet) -> fx.GraphModule:
    """The model's raw graph, by symbolic tracing in evaluation mode; a `GraphModule` is taken as it is.

    Raises:
        TraceError: the model cannot be followed symbolically.
    """
    if isinstance(model, fx.GraphModule):
        return model
    if rules.keeps_whole(type(model)):
        model = nn.Sequential(model)
    tracer = _Tracer(rules)
    with evaluating(model):
        try:
            graph = tracer.trace(model)
        except Exception as error:  # whatever the user's forward raises while it is traced
            raise TraceError(
                f"{type(model).__name__} cannot be traced symbolically: {error}. Usual causes are Python control flow "
                "on tensor values or shapes in forward(); move it into a function of its own and give that function a "
                "rule with @fxinvert.inverse_rule, which keeps it whole."
            ) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def attribute(module: nn.Module, target: str) -> Any:
    """What a dotted name stands for: `"layer1.conv.weight"`."""
    return functools.reduce(getattr, target.split("."), module)


def describe(node: fx.Node) -> str:
    """A node as messages name it: its module path, its op, and the user's source line where known."""
    path = node.meta.get("path", node.name)
    text = f"node {path!r}, {node.op} {_target_name(node.target)}"
    line = _source_line(node.stack_trace)
    return f"{text}, at {line}" if line else text


def _target_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _source_line(stack: str | None) -> str | None:
    if not stack:
        return None
    places = [line.strip() for line in stack.splitlines() if line.strip().startswith("File")]
    return places[-1] if places else None
