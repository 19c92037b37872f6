"""Export: capture with `torch.export` of what symbolic tracing cannot follow, as the same kind of raw graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from fxinvert.errors import TraceError
from fxinvert.passes.as_run import AsRun
from fxinvert.passes.capture import attribute, describe, raised_at
from fxinvert.passes.fakes import with_fakes
from fxinvert.passes.inputs import Flat, Inputs
from fxinvert.passes.leaves import mapped
from fxinvert.passes.program import check_sizes, program_of, without_exclusions
from fxinvert.passes.questions import Question
from fxinvert.passes.selected import as_it_runs
from fxinvert.passes.writes import without_writes
from fxinvert.passes.written import CONSTANT
from fxinvert.quiet import quiet

#: calls of a sub-graph in a context that does not matter here: (the argument that is the sub-graph, its first input)
_WRAPPERS: dict[Any, tuple[int, int]] = {
    torch.ops.higher_order.wrap_with_autocast: (4, 5),
    torch.ops.higher_order.wrap_with_set_grad_enabled: (1, 2),
}


class SubgraphError(TraceError):
    """An op on sub-graphs is none that can be followed."""


def export_graphs(
    model: nn.Module, inputs: Inputs, values: tuple[Tensor, ...], choose: Callable[[Any], Any]
) -> Iterator[fx.GraphModule]:
    """The model's raw graph by `torch.export` (non-strict, any batch size); parameters are the model's own.

    Then the same after torch has functionalized it, which takes as long again: views that are written into are told apart
    there, whichever they are, the casts of `torch.autocast` are ops, `torch.vmap` is written out, and the graph is less
    like what the user wrote. A model that needs these two is given so only. Then both of the model as it runs (`AsRun`),
    and at once where torch cannot export it else. What computes on rows that values select comes last, behind the same on
    all rows (`selected.py`).

    Args:
        model: in evaluation mode.
        inputs: how it is called.
        values: example tensors.
        choose: what is taken of its result.

    Raises:
        TraceError: the model cannot be exported, or only for the example's batch size.
    """
    rows = max(len(v) for v in values if v.dim())
    shared = [v.dim() > 0 and len(v) == rows for v in values]
    # a size of 1 would be taken for a constant, and that of what an earlier run has left on the model for the only one
    if rows == 1 or any(len(buffer) == rows for buffer in model.buffers() if buffer.dim()):
        values = tuple(torch.cat([v, v]) if own else v for v, own in zip(values, shared, strict=True))
    flat = Flat(model, inputs, choose)
    failed: list[TraceError] = []
    decided: Question | None = None
    refused, late = "", list[fx.GraphModule]()

    def among_all(flat: Flat) -> Iterator[fx.GraphModule]:
        for graph, selects in _graphs(flat, values, shared):
            if selects:
                late.append(graph)
            else:
                yield graph

    try:
        yield from among_all(flat)
    except SubgraphError:  # the same as it runs, after which torch could no longer compile such ops
        raise
    except TraceError as error:
        failed.append(error)
    try:
        for as_run in as_it_runs(flat, values):
            decided = decided or (as_run.decided if isinstance(as_run, AsRun) else None)
            try:
                yield from among_all(as_run)
            except TraceError as error:
                failed.append(error)
    except TraceError as error:
        failed.append(error)
        refused = "" if error is failed[0] else f"; {error}"
    yield from late
    if failed:
        asked = f"; {decided}" if decided else ""
        raise TraceError(f"{failed[0]}{asked}{refused}") from failed[0]


def _graphs(
    flat: Flat, values: tuple[Tensor, ...], shared: list[bool]
) -> Iterator[tuple[fx.GraphModule, bool]]:
    """The raw graphs, and whether they compute on rows that values select."""
    model, inputs = flat.model, flat.inputs
    with _raising_ours(model), with_fakes():
        program, sizes = program_of(flat, values, shared)

        def rebuilt(captured: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
            raw = _Rebuilt(model, captured, inputs, "model", _first).raw()
            without_exclusions(raw)  # which torch may have written into it again
            check_sizes(sizes, flat, raw, values, shared)
            return raw, any(map(_of_selected_rows, captured.graph.nodes))

        with quiet():  # a tensor that an earlier run has left on a model may have gradients
            captured = program.module()
        if not _needs_context(captured):
            yield rebuilt(captured)
        with quiet():
            captured = program.run_decompositions({}).module()
        yield rebuilt(captured)


@contextmanager
def _raising_ours(model: nn.Module) -> Iterator[None]:
    """Runs the body; what the exporter raises on the user's code is an error of ours."""
    try:
        yield
    except TraceError:
        raise
    except Exception as error:  # whatever it is
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TraceError(
            f"torch.export cannot capture {type(model).__name__}: {reason}{raised_at(error)}"
        ) from error


def _needs_context(captured: fx.GraphModule) -> bool:
    """Whether ops mean what they do by a context that others open: `torch.autocast`, or the levels of `torch.func`."""
    graphs = [module for module in captured.modules() if isinstance(module, fx.GraphModule)]
    return any(
        getattr(node.target, "__module__", "") == "torch._functorch.predispatch"
        or (node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2])
        for own in graphs
        for node in own.graph.nodes
    )


def _of_selected_rows(node: fx.Node) -> bool:
    """Whether a node of an exported graph has numbers in rows of which values tell how many there are."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # slow to import

    value = node.meta.get("val")
    return (
        isinstance(value, Tensor) and value.is_floating_point() and bool(free_unbacked_symbols(value.shape))
    )


def _follows_rows(value: Any) -> bool:
    """Whether a value of an exported graph is computed from inputs that have a row for every sample."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "placeholder":
        return any(isinstance(size, torch.SymInt) for size in value.meta["val"].shape)
    return any(map(_follows_rows, value.all_input_nodes))


def _first(results: Any) -> Any:
    return results[0]


def exported_graph(captured: fx.GraphModule, inputs: Inputs, choose: Callable[[Any], Any]) -> fx.GraphModule:
    """The raw graph of an exported program's module.

    Args:
        captured: such a module.
        inputs: how it is called.
        choose: what is taken of its result.
    """
    codegen = captured.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen), "a graph that is not exported"
    form = codegen.pytree_info.out_spec
    assert form is not None, "an exported graph without outputs"

    def chosen(results: Any) -> Any:
        return choose(pytree.tree_unflatten(list(results), form))

    return _Rebuilt(captured, captured, inputs, "", chosen).raw()


def _place(value: Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers are, and how they lie there."""
    return value.data_ptr(), value.dtype, value.device, value.shape, value.stride()


class _Rebuilt:
    """The exported graph on the user's own parameters, by the user's names."""

    def __init__(
        self,
        model: nn.Module,
        captured: fx.GraphModule,
        inputs: Inputs,
        root: str,
        choose: Callable[[Any], Any],
    ) -> None:
        self.model, self.graph, self.root = model, fx.Graph(), root
        self.attributes: dict[str, Any] = {}
        self.parameters = {
            _place(p): (name, p) for name, p in model.named_parameters() if type(p) is nn.Parameter
        }
        self.nodes: dict[fx.Node, Any] = {}
        tensors = iter(inputs.names)
        placeholders = captured.graph.find_nodes(op="placeholder")
        given = (
            inputs.constants if len(placeholders) == len(inputs.constants) else (Tensor,) * len(inputs.names)
        )
        for node, value in zip(placeholders, given, strict=True):
            self.nodes[node] = self.graph.placeholder(next(tensors)) if value is Tensor else value
        self.owners = self._owners(captured.graph)
        tracer = GraphAppendingTracer(self.graph)
        results = mapped(self._copied(captured), lambda node: fx.Proxy(node, tracer))
        self.graph.output(choose(results).node)

    def raw(self) -> fx.GraphModule:
        """The graph, its in-place ops written out."""
        graph = fx.GraphModule(self.attributes, self.graph, type(self.model).__name__)
        without_writes(graph)
        return graph

    def _copied(self, module: fx.GraphModule) -> Any:
        """Copies a graph's nodes behind those that are there; gives the tuple of what it returns."""
        for node in module.graph.nodes:
            if node.op == "output":
                return self._new(node.args[0])
            if node.op == "get_attr":
                self.nodes[node] = self._attribute(module, str(node.target))
            elif node.target in _WRAPPERS:
                which, first = _WRAPPERS[node.target]
                self.nodes[node] = self._inlined(node.args[which], node.args[first:])
            elif node.target is torch.ops.higher_order.cond:
                self.nodes[node] = self._both(node)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                raise SubgraphError(
                    f"{describe(node)} runs sub-graphs, which no inverse goes through; compute all of them and choose with "
                    "torch.where, or write the loop in Python"
                )
            elif node.target is torch.ops.aten._assert_tensor_metadata.default:
                continue  # that a value has the type which it had; it would keep what nothing else needs
            elif node.op == "call_function":
                copy = self.graph.node_copy(node, self.nodes.__getitem__)
                copy.meta["path"] = self.owners.get(node)
                copy.meta["scope"] = self._scope(node)
                self.nodes[node] = copy
        raise AssertionError("a graph without an output")

    def _inlined(self, called: Any, given: Any) -> Any:
        inner = self.nodes[called]
        self.nodes.update(zip(inner.graph.find_nodes(op="placeholder"), self._new(given), strict=True))
        return self._copied(inner)

    def _both(self, node: fx.Node) -> Any:
        """`torch.cond` as both of its branches, and a choice between what they give."""
        condition, yes, no, operands = node.args
        if _follows_rows(condition):
            raise SubgraphError(
                f"{describe(node)} decides for all samples of a batch at once by what they hold, or how many they are, so that no "
                "sample has a target of its own; compute both branches and choose for each sample with torch.where"
            )
        chosen = self._new(condition)
        pairs = zip(self._inlined(yes, operands), self._inlined(no, operands), strict=True)
        return tuple(self.graph.call_function(torch.where, (chosen, *pair)) for pair in pairs)

    def _attribute(self, module: fx.GraphModule, target: str) -> Any:
        value = attribute(module, target)
        if isinstance(value, fx.GraphModule):
            return value
        name = target.removeprefix(f"{self.root}.")
        try:
            own = attribute(self.model, name) is value
        except AttributeError:
            own = False
        if not own and type(value) in (Tensor, nn.Parameter):
            # code may have it in a list or dictionary of its own, so that the exporter takes it for a constant
            parameter = self.parameters.get(_place(value))
            if parameter is not None:
                (name, value), own = parameter, True
        if not own and "." in name:  # a constant of the graph's
            name = name.replace(".", "_")
        self.attributes[name] = value
        node = self.graph.get_attr(name)
        node.meta[CONSTANT] = not own
        return node

    def _new(self, argument: Any) -> Any:
        return map_arg(argument, self.nodes.__getitem__)

    def _stack(self, node: fx.Node) -> list[tuple[str, str]]:
        """The modules that a node was called in, outermost first: (path, class)."""
        entries = [(str(path), str(kind)) for path, kind in node.meta.get("nn_module_stack", {}).values()]
        return [
            (path.removeprefix(self.root).removeprefix("."), kind)
            for path, kind in entries
            if path.startswith(self.root)
        ]

    def _scope(self, node: fx.Node) -> str:
        return ([path for path, _ in self._stack(node)] or [""])[-1]

    def _owners(self, graph: fx.Graph) -> dict[fx.Node, str]:
        """The nodes that give the result of one of torch's own modules, and that module's path."""
        last: dict[str, fx.Node] = {}
        for node in graph.nodes:
            stack = self._stack(node)
            path, kind = stack[-1] if stack else ("", "")
            if path and kind.startswith("torch.nn") and isinstance(node.meta.get("val"), torch.Tensor):
                last[path] = node
        return {node: path for path, node in last.items()}
