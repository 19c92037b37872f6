"""Normalize: rewrite a captured graph so that every op has one spelling.

The raw graph is run once on the example, node by node, and rebuilt as it runs:

* a torch function, method, operator or in-place op becomes the ATen op that it stands for (`spelling.py`);
* one of torch's own modules becomes the ops that its forward calls, its parameters read by name (`inline.py`);
* a module or function with a rule of its own stays whole;
* anything else stays as it is, and is inverted only if a rule is found for it.

Every node of the result carries in `meta`: `tensor_meta` (shape, dtype, …), `path` (the name by which users know it,
no two ops have the same: the module path, or the node's own name), `op` (the key of its rule), `active` (whether it
follows the input, see `activity.py`) and `stack_trace` (the user's source lines, where known).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata

from fxinvert.errors import TraceError
from fxinvert.passes.activity import mark, start_later
from fxinvert.passes.calls import CHANGED, evaluate, given_again
from fxinvert.passes.capture import attribute, describe
from fxinvert.passes.decompose import DECOMPOSED
from fxinvert.passes.entries import SOME
from fxinvert.passes.forms import arranged, by_position
from fxinvert.passes.in_place import check_in_place
from fxinvert.passes.inline import record
from fxinvert.passes.interpreted import Interpreted
from fxinvert.passes.inverse_op import call_arguments
from fxinvert.passes.leaves import any_tensor, evaluation_copy, identifier, leaves, mapped, printable
from fxinvert.passes.meanings import Meanings
from fxinvert.passes.parts import SPLITS, parts
from fxinvert.passes.paths import Paths, scope_of
from fxinvert.passes.runs import said
from fxinvert.passes.spelling import Call, to_aten
from fxinvert.passes.written import Written
from fxinvert.rules import RuleSet, key_of

#: what gives the same value however the input lies in memory (the kernels of attention that are differentiated give results
#: of other layouts), or so that it can be differentiated: what training shall not follow, values do
_INSTEAD = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.detach.default: torch.ops.aten.alias.default,
}


def normalize(
    raw: fx.GraphModule, inputs: tuple[Any, ...], rules: RuleSet
) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """The normalized graph of a captured one, in evaluation mode, with annotations from one run on `inputs`.

    Returns:
        The graph, and the values of its nodes in that run.

    Raises:
        RunError: the graph does not run.
        TraceError: it changes a shared tensor in place.
    """
    builder = Builder(raw, rules)
    with torch.no_grad():
        builder.run(inputs)
    graph = Interpreted(raw, builder.graph, raw.__class__.__name__)
    graph.training = False
    graph.graph.eliminate_dead_code()
    start_later(graph, rules)
    for node in graph.graph.nodes:
        node.meta.pop(SOME, None)
    # modules that stay whole share their parameters with the user's, but not the mode: the graph always evaluates
    for target in sorted({str(n.target) for n in graph.graph.find_nodes(op="call_module")}):
        *path, name = target.split(".")
        setattr(graph.get_submodule(".".join(path)), name, evaluation_copy(graph.get_submodule(target)))
    return printable(graph), {node: builder.values[node] for node in graph.graph.nodes if node.op != "output"}


class RunError(TraceError):
    """A graph does not run on the example inputs."""


class Builder:
    """Rebuilds a graph while running it."""

    def __init__(self, raw: fx.GraphModule, rules: RuleSet) -> None:
        self.raw, self.rules = raw, rules
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, Any] = {}  # raw node → new node, or a literal
        self.values: dict[fx.Node, Any] = {}  # new node → value in the example run
        self.stack: str | None = None  # where the user wrote the raw node at hand
        self.parameters: dict[int, str] = {}
        for name, tensor in (*raw.named_parameters(), *raw.named_buffers()):
            self.parameters.setdefault(id(tensor), name)
        self.written = Written(raw)
        # raw node and version of its value → new node
        self.constants: dict[tuple[fx.Node, int], fx.Node] = {}
        self.meanings = Meanings(self.value_of)
        self.paths = Paths(raw)

    def run(self, inputs: tuple[Any, ...]) -> None:
        remaining = list(inputs)
        for node in self.raw.graph.nodes:
            self.stack, self.paths.scope = node.stack_trace, scope_of(node)
            if node.op == "placeholder":
                self._placeholder(node, remaining)
            elif node.op == "output":
                self.graph.output(self._new(node.args[0]))
            else:
                try:
                    if node in self.written.nodes:
                        self.written.run(node, self._value)
                    else:
                        self.nodes[node] = self._rebuilt(node)
                except TraceError:
                    raise
                except Exception as error:  # whatever the user's code raises on the example
                    raise RunError(
                        f"the model does not run on the example inputs: {describe(node)}: {said(error)}"
                    ) from error
        if remaining:
            raise TraceError(
                f"the model takes {len(inputs) - len(remaining)} inputs; {len(inputs)} were given"
            )

    def value_of(self, argument: Any) -> Any:
        """The example value of a (nested) argument of the new graph."""
        return mapped(argument, lambda node: self.values[node])

    def _new(self, argument: Any) -> Any:
        return map_arg(argument, self._node)

    def _node(self, raw: fx.Node) -> Any:
        """The new node, or the literal, for a raw one."""
        if raw not in self.written.nodes:
            return self.nodes[raw]
        value = self.written.values[raw]
        if not isinstance(value, Tensor):
            return value
        version = raw, value._version  # it may be written into later
        if version not in self.constants:
            name = self.paths.free(f"{raw.name}_constant")
            self.raw.register_buffer(name, value.clone())
            self.constants[version] = self._attribute(name)
        return self.constants[version]

    def _placeholder(self, node: fx.Node, remaining: list[Any]) -> None:
        if not remaining:
            if node.args:  # an input with a default value is the constant that it defaults to
                self.nodes[node] = node.args[0]
                return
            raise TraceError(f"the model needs an input {node.target!r}; example_inputs has none left for it")
        name = str(node.target)
        self.paths.take(name)
        self.nodes[node] = self._annotated(self.graph.placeholder(name), remaining.pop(0), name)

    def _rebuilt(self, node: fx.Node) -> Any:
        args, kwargs = self._new(node.args), self._new(node.kwargs)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        check_in_place(node, self.raw, (*self.nodes, *self.written.values), self._value)
        if node.target is operator.getitem and isinstance(args[0], tuple | list):
            return args[0][args[1]]  # one of several tensors, each of which has a node
        if node.op != "call_module":
            owner = node.meta.get("path")
            target, args = by_position(node.target, args)
            return self.called(target, args, kwargs, owner and self.paths.of_module(owner))
        module = self.raw.get_submodule(str(node.target))
        path = self.paths.of_module(str(node.target))
        if not self.rules.keeps_whole(type(module)) and type(module).__module__.startswith("torch.nn"):
            inlined = record(self, module, args, kwargs, path)
            if inlined is not None:
                return inlined
        return self.emit("call_module", node.target, args, kwargs, path, self.rules.key(type(module)))

    def _split(self, call: Call, path: str | None) -> tuple[fx.Node, ...] | None:
        """A call that gives several tensors as one call for each."""
        key = key_of(call.op)
        # sizes that vary
        computed = any(isinstance(a, fx.Node) for a in leaves((call.args[1:], call.kwargs)))
        if key not in SPLITS or not call.args[0].meta["active"] or computed:
            return None
        values, named = self.value_of((call.args, call.kwargs))
        pieces = parts(key, call.op(*values, **named), call_arguments(call.op, values, named))
        base = path or self.paths.of_op(key)
        return tuple(
            self.emit(
                "call_function", op, (call.args[0], *rest), {}, self.paths.free(f"{base}.{i}"), key_of(op)
            )
            for i, (op, rest) in enumerate(pieces)
        )

    def takes_apart(self, function: Any) -> bool:
        """Whether a function is written out as others; not one that has a rule, which is the user's."""
        return function in DECOMPOSED and self.rules.key(function) not in self.rules

    def called(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str | None) -> Any:
        """Emits a call, as ATen where that exists; gives its node, or those of the several tensors that it gives."""
        if self.takes_apart(function):
            inlined = record(self, function, args, kwargs, path or self.paths.of_op(key_of(function)))
            if inlined is not None:
                return inlined
        if not self.rules.keeps_whole(function):
            spelled = to_aten(function, args, kwargs, self.value_of)
            call = next((call for call in spelled if self.meanings.same(call, function, args, kwargs)), None)
            if call is not None:
                call = arranged(call)
                split = self._split(call, path)
                if split is not None:
                    return split
                given = given_again(call.op, call.args, self.values)
                if given is not None:
                    return given
                op = _INSTEAD.get(call.op, call.op)
                return self.emit("call_function", op, call.args, call.kwargs, path, key_of(call.op))
            name = function if isinstance(function, str) else getattr(function, "__name__", "")
            if isinstance(function, str) or getattr(Tensor, name, None) is function:
                return self.emit("call_method", name, args, kwargs, path, name)
        return self.emit("call_function", function, args, kwargs, path, self.rules.key(function))

    def emit(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str | None, key: str
    ) -> fx.Node:
        """Adds a node to the new graph and evaluates it; without a path it is known by the name of its op."""
        values, named = self.value_of((args, kwargs))
        path = path or self.paths.of_op(key)
        node = self.graph.create_node(op, target, args, kwargs, name=identifier(path))
        node.meta["op"] = key
        if op == "call_method":
            value = evaluate(getattr(type(values[0]), target), values, named)
        else:
            value = evaluate(self.raw.get_submodule(target) if op == "call_module" else target, values, named)
        if value is CHANGED:
            node.meta["path"], node.stack_trace = path, self.stack
            raise TraceError(
                f"{describe(node)} changes its input in place; use an op that returns a new tensor, "
                "so that the input keeps its value for the inverse pass"
            )
        if args and isinstance(args[0], fx.Node) and args[0].op == "get_attr" and value is values[0]:
            self.graph.erase_node(node)  # `weight.to(x.dtype)` is the weight
            return args[0]
        if any(value is own for own in leaves((values, named))):
            value = torch.ops.aten.alias(value) if isinstance(value, Tensor) else value  # a value of its own
        return self._annotated(node, value, path)

    def parameter(self, tensor: Tensor) -> fx.Node | None:
        """A node that reads a parameter or buffer of the model, if the tensor is one."""
        name = self.parameters.get(id(tensor))
        return None if name is None else self._attribute(name)

    def _attribute(self, target: str) -> fx.Node:
        value = attribute(self.raw, target)
        # tied parameters have several names, and are read by one
        target = self.parameters.get(id(value), target)
        return self._annotated(self.graph.get_attr(target), value, target)

    def _annotated(self, node: fx.Node, value: Any, path: str) -> fx.Node:
        self.values[node] = value
        node.meta["path"] = path
        if self.stack and node.op != "get_attr":
            node.stack_trace = self.stack
        if any_tensor(value):
            node.meta["tensor_meta"] = map_aggregate(value, _described)
        mark(node, value, self.rules, self.value_of)
        return node

    def _value(self, raw: fx.Node) -> Any:
        return self.written.values[raw] if raw in self.written.nodes else self.value_of(self.nodes[raw])


def _described(value: Any) -> Any:
    """What is known of a tensor, as torch's shape propagation says it; anything else itself."""
    if not isinstance(value, Tensor):
        return value
    if value.layout is not torch.strided or value.is_quantized or not value.is_contiguous():
        return _extract_tensor_metadata(value)
    # the same, without looking for other layouts
    return TensorMetadata(
        value.shape, value.dtype, value.requires_grad, value.stride(), torch.contiguous_format, False, {}
    )
