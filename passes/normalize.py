"""Normalize: rewrite a captured graph so that every op has one spelling.

The raw graph is run once on the example, node by node, and rebuilt as it runs:

* a torch function, method, operator or in-place op becomes the ATen op that it stands for (`spelling.py`);
* one of torch's own modules becomes the ops that its forward calls, its parameters read by name;
* a module or function with a rule of its own stays whole;
* anything else stays as it is, and is inverted only if a rule is found for it.

Every node of the result carries in `meta`: `tensor_meta` (shape, dtype, …), `path` (the name by which users know it:
the module path, or the node's own name), `op` (the key of its rule) and `active` (whether it depends on the input).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.overrides import TorchFunctionMode

from fxinvert.errors import TraceError
from fxinvert.passes.capture import attribute, describe
from fxinvert.passes.spelling import is_in_place, to_aten
from fxinvert.rules import RuleSet, key_of


def normalize(
    raw: fx.GraphModule, inputs: tuple[Any, ...], rules: RuleSet, output: int | str | None
) -> fx.GraphModule:
    """The normalized graph of a captured one, in evaluation mode, with annotations from one run on `inputs`.

    Raises:
        TraceError: the graph does not run, changes a shared tensor in place, or has several outputs and none is named.
    """
    builder = _Builder(raw, rules)
    with torch.no_grad():
        builder.run(inputs, output)
    graph = fx.GraphModule(builder.root, builder.graph, raw.__class__.__name__)
    graph.training = False
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class _Builder:
    """Rebuilds a graph while running it."""

    def __init__(self, raw: fx.GraphModule, rules: RuleSet) -> None:
        self.raw, self.rules = raw, rules
        self.root: nn.Module = raw
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, Any] = {}  # raw node → new node, or a literal
        self.values: dict[fx.Node, Any] = {}  # new node → value in the example run
        self.paths: dict[str, int] = {}
        self.parameters = {
            id(tensor): name
            for pairs in (
                raw.named_parameters(remove_duplicate=True),
                raw.named_buffers(remove_duplicate=True),
            )
            for name, tensor in pairs
        }

    def run(self, inputs: tuple[Any, ...], output: int | str | None) -> None:
        remaining = list(inputs)
        for node in self.raw.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, remaining)
            elif node.op == "output":
                chosen = supervised(self.value_of(node.args[0]), output, self._new(node.args[0]))
                self.graph.output(chosen)
            else:
                try:
                    self.nodes[node] = self._rebuilt(node)
                except TraceError:
                    raise
                except Exception as error:
                    raise TraceError(
                        f"the model does not run on the example inputs: {describe(node)}: {error}"
                    ) from error
        if remaining:
            raise TraceError(
                f"the model takes {len(inputs) - len(remaining)} inputs; {len(inputs)} were given"
            )

    def value_of(self, argument: Any) -> Any:
        """The example value of a (nested) argument of the new graph, or of the raw one."""

        def value(node: fx.Node) -> Any:
            new = self.nodes.get(node, node)
            return self.values[new] if isinstance(new, fx.Node) else new

        return _mapped(argument, value)

    def _new(self, argument: Any) -> Any:
        return map_arg(argument, lambda node: self.nodes[node])

    def _placeholder(self, node: fx.Node, remaining: list[Any]) -> None:
        if not remaining:
            if node.args:  # an input with a default value is the constant that it defaults to
                self.nodes[node] = node.args[0]
                return
            raise TraceError(f"the model needs an input {node.target!r}; example_inputs has none left for it")
        new = self.graph.placeholder(str(node.target))
        self.nodes[node] = self._annotated(new, remaining.pop(0), str(node.target))

    def _rebuilt(self, node: fx.Node) -> Any:
        args, kwargs = self._new(node.args), self._new(node.kwargs)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "call_module":
            module = self.raw.get_submodule(str(node.target))
            path = self._unique(str(node.target))
            if self.rules.keeps_whole(type(module)) or not type(module).__module__.startswith("torch.nn"):
                return self._emit(
                    "call_module", node.target, args, kwargs, path, self.rules.key(type(module))
                )
            return self._inlined(module, args, kwargs, path)
        function: Any = node.target
        self._check_in_place(node, function)
        return self._called(function, args, kwargs, None)

    def _called(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str | None) -> Any:
        """Emits a call, as ATen where that exists."""
        if not self.rules.keeps_whole(function):
            call = to_aten(function, args, kwargs, self.value_of)
            if call is not None and any(
                isinstance(v, Tensor) for v in _leaves(self.value_of((call.args, call.kwargs)))
            ):
                return self._emit("call_function", call.op, call.args, call.kwargs, path, key_of(call.op))
        if isinstance(function, str):
            return self._emit("call_method", function, args, kwargs, path, function)
        return self._emit("call_function", function, args, kwargs, path, self.rules.key(function))

    def _inlined(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Any:
        """One of torch's modules as the functions that it calls; whole if they cannot be followed."""
        recorder = _Recorder(self, path)
        values, named = self.value_of((args, kwargs))
        for node, value in zip(_leaves((args, kwargs)), _leaves((values, named)), strict=True):
            if isinstance(value, Tensor):
                recorder.known[id(value)] = node
        with recorder:
            result = module(*values, **named)
        node = recorder.known.get(id(result))
        if not isinstance(node, fx.Node) or not recorder.complete:
            for emitted in reversed(recorder.emitted):
                self.graph.erase_node(emitted)
            return self._emit("call_module", path.split("@")[0], args, kwargs, path, key_of(type(module)))
        if not recorder.emitted:  # the module returns its input: keep a node that bears its name
            return self._emit("call_function", torch.ops.aten.alias.default, args[:1], {}, path, "alias")
        node.meta["path"] = path
        node._rename(_identifier(path))
        return node

    def _attribute(self, target: str) -> fx.Node:
        return self._annotated(self.graph.get_attr(target), attribute(self.raw, target), target)

    def parameter(self, tensor: Tensor) -> fx.Node | None:
        """A node that reads a parameter or buffer of the model, if the tensor is one."""
        name = self.parameters.get(id(tensor))
        return None if name is None else self._attribute(name)

    def _emit(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str | None, key: str
    ) -> fx.Node:
        values, named = self.value_of((args, kwargs))
        if op == "call_module":
            value = self.raw.get_submodule(target)(*values, **named)
        elif op == "call_method":
            value = getattr(values[0], target)(*values[1:], **named)
        else:
            value = target(*values, **named)
        node = self.graph.create_node(op, target, args, kwargs, name=_identifier(path or key))
        node.meta["op"] = key
        return self._annotated(node, value, path or node.name)

    def _annotated(self, node: fx.Node, value: Any, path: str) -> fx.Node:
        self.values[node] = value
        node.meta["path"] = path
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        differentiable = isinstance(value, Tensor) and value.is_floating_point()
        fed = node.op == "placeholder" or any(n.meta["active"] for n in node.all_input_nodes)
        node.meta["active"] = fed and differentiable
        return node

    def _unique(self, path: str) -> str:
        """A module that is called again gets a name of its own: `act`, `act@2`, …"""
        count = self.paths[path] = self.paths.get(path, 0) + 1
        return path if count == 1 else f"{path}@{count}"

    def _check_in_place(self, node: fx.Node, function: Any) -> None:
        changed = node.args[0] if node.args else None
        if not isinstance(changed, fx.Node) or not is_in_place(function, node.args, node.kwargs):
            return
        later = [user for user in changed.users if user is not node and node < user]
        if later:
            raise TraceError(
                f"{describe(node)} changes its input in place, and {describe(later[0])} reads it afterwards; "
                "use the op that returns a new tensor"
            )


class _Recorder(TorchFunctionMode):
    """Follows a module's forward by the torch functions that it calls, and emits them."""

    def __init__(self, builder: _Builder, path: str) -> None:
        super().__init__()
        self.builder, self.path = builder, path
        self.known: dict[int, Any] = {}
        self.kept: list[Tensor] = []  # ids are only good while their tensors live
        self.emitted: list[fx.Node] = []
        self.complete = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(value, Tensor) for value in _leaves((args, kwargs))):
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        new_args, new_kwargs = self._node((args, kwargs))
        node = self.builder._called(func, new_args, new_kwargs, f"{self.path}.{func.__name__}")
        self.emitted.append(node)
        result = self.builder.values[node]
        self.known[id(result)] = node
        self.kept.append(result)
        return result

    def _node(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            node = self.known.get(id(argument))
            if node is None:
                node = self.builder.parameter(argument)
                self.complete = self.complete and node is not None
            return node
        if isinstance(argument, tuple | list):
            return type(argument)(self._node(a) for a in argument)
        if isinstance(argument, dict):
            return {name: self._node(a) for name, a in argument.items()}
        return argument


def supervised(values: Any, output: int | str | None, nodes: Any = None) -> Any:
    """The one output that is supervised: of `values`, or of `nodes` of the same structure if given.

    Raises:
        TraceError: there are several and none is named, or there is no such output.
    """
    chosen_from = values if nodes is None else nodes
    if isinstance(values, Tensor):
        return chosen_from
    names = (
        list(values)
        if isinstance(values, dict)
        else list(range(len(values)))
        if isinstance(values, tuple | list)
        else []
    )
    tensors = [name for name in names if isinstance(values[name], Tensor)]
    if not tensors:
        raise TraceError(
            f"the model returns {type(values).__name__}; a tensor, tuple, list or dict of tensors is needed"
        )
    listed = ", ".join(map(repr, tensors))
    if output is None and len(tensors) > 1:
        raise TraceError(
            f"the model returns {len(tensors)} outputs ({listed}); "
            f"name the one that the labels are for, e.g. output={tensors[0]!r}"
        )
    chosen = tensors[0] if output is None else output
    if chosen not in tensors:
        raise TraceError(f"the model has no output {chosen!r}; it returns {listed}")
    return chosen_from[chosen]


def _identifier(path: str) -> str:
    return re.sub(r"\W", "_", path)


def _mapped(argument: Any, value: Callable[[fx.Node], Any]) -> Any:
    """`map_arg` that gives plain containers of values, tensors included."""
    if isinstance(argument, fx.Node):
        return value(argument)
    if isinstance(argument, tuple | list):
        kind = tuple if isinstance(argument, tuple) else list
        return kind(_mapped(a, value) for a in argument)
    if isinstance(argument, dict):
        return {name: _mapped(a, value) for name, a in argument.items()}
    return argument


def _leaves(argument: Any) -> list[Any]:
    if isinstance(argument, tuple | list):
        return [leaf for a in argument for leaf in _leaves(a)]
    if isinstance(argument, dict):
        return [leaf for a in argument.values() for leaf in _leaves(a)]
    return [argument]
