"""Ready: graphs that others have captured, as they are in evaluation mode."""

from __future__ import annotations

from torch import fx
from torch.fx.graph import _PyTreeCodeGen

#: arguments that say whether an op is to work as it does in training
_TRAINING = frozenset(["train", "training"])


def is_exported(graph: fx.GraphModule) -> bool:
    """Whether a graph module comes from an `ExportedProgram`."""
    return isinstance(graph.graph._codegen, _PyTreeCodeGen)


def in_evaluation(captured: fx.GraphModule) -> fx.GraphModule:
    """A captured graph as it is in evaluation mode, on the same parameters, whichever mode it was captured in.

    Ops that work differently in training say so by an argument, which a capture fixes.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))
    graph.set_codegen(captured.graph._codegen)
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        named = [argument.name for argument in schema.arguments] if schema else []
        for i, name in enumerate(named[: len(node.args)]):
            if name in _TRAINING:
                node.update_arg(i, False)
        for name in _TRAINING & node.kwargs.keys():
            node.update_kwarg(name, False)
    return fx.GraphModule(captured, graph, type(captured).__name__)
