"""Capture: from a model to a raw torch.fx graph, the model left as it was found."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Runs the body, then undoes what it did to the model: attributes that forward() sets, buffers that it updates."""
    modules = [(module, dict(vars(module))) for module in model.modules()]
    tables = [(table, dict(table)) for _, saved in modules for table in saved.values() if type(table) is dict]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for module, saved in modules:
            _restore(vars(module), saved)
        for table, entries in tables:
            _restore(table, entries)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


class _Tracer(fx.Tracer):
    """Keeps torch's own modules and those with a rule of their own whole.

    Only the inputs that are given become inputs of the graph; the others have their default values while tracing, so
    that forward() may branch on them.
    """

    record_stack_traces = True
    proxy_buffer_attributes = True  # what is computed from a buffer follows the buffer

    def __init__(self, rules: RuleSet, inputs: int) -> None:
        super().__init__(autowrap_functions=tuple(rules.whole_functions))
        self.rules, self.inputs = rules, inputs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.rules.keeps_whole(type(m)) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = _input_names(root_fn, self.inputs)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]


def capture(model: nn.Module, inputs: int, rules: RuleSet) -> fx.GraphModule:
    """The model's raw graph, by symbolic tracing in evaluation mode; a `GraphModule` is taken as it is.

    Args:
        model: the model.
        inputs: how many inputs it is given; those beyond have their default values.
        rules: modules and functions that they name are kept whole.

    Raises:
        TraceError: the model cannot be followed symbolically, or does not take so many inputs.
    """
    if isinstance(model, fx.GraphModule):
        return model
    if rules.keeps_whole(type(model)):
        model = nn.Sequential(model)
    tracer = _Tracer(rules, inputs)
    with evaluating(model), unchanged(model):
        try:
            graph = tracer.trace(model)
        except TraceError:
            raise
        except Exception as error:  # whatever the user's forward raises while it is traced
            if tracer.is_leaf_module(model, ""):  # torch's modules need not be traceable, only runnable
                return capture(nn.Sequential(model), inputs, rules)
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


def no_path(graph: fx.GraphModule) -> str:
    """Why the output does not depend on a floating-point input, in words: the ops that end every path."""
    ends = [n for n in graph.graph.nodes if not n.meta.get("active", True) and n.op != "get_attr"]
    stops = [n for n in ends if "tensor_meta" in n.meta and any(i.meta["active"] for i in n.all_input_nodes)]
    text = "the output does not depend on a floating-point input"
    return (
        f"{text}: the way ends at {describe(stops[-1])}, whose values do not follow its input as real numbers"
        if stops
        else text
    )


def _input_names(forward: Callable[..., Any], count: int) -> list[str]:
    """Names for the first `count` inputs of a forward function.

    Raises:
        TraceError: it takes fewer, or needs more.
    """
    _, *parameters = inspect.signature(forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p.name for p in parameters if p.kind == p.VAR_POSITIONAL]
    names = [p.name for p in positional[:count]]
    if rest:
        names += [f"{rest[0]}_{i}" for i in range(count - len(names))]
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    missing = [p.name for p in needed if p.name not in names]
    if missing:
        raise TraceError(
            f"the model needs an input {missing[0]!r}; example_inputs has {count} inputs and none left for it"
        )
    if len(names) < count:
        raise TraceError(f"the model takes {len(names)} inputs; {count} were given")
    return names


def _restore(table: dict[str, Any], saved: dict[str, Any]) -> None:
    table.clear()
    table.update(saved)


def _target_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


#: frames in these folders are not the user's
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parent))


def _source_line(stack: str | None) -> str | None:
    """The innermost line of a stack that is neither torch's nor ours."""
    places = [line.strip() for line in (stack or "").splitlines() if line.strip().startswith('File "')]
    own = [place for place in places if not place.removeprefix('File "').startswith(_FOREIGN)]
    return own[-1] if own else None
