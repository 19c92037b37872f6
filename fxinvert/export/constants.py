"""Constants: what no input reaches is computed beforehand where a file cannot say how.

Weights may follow from parameters by ops that ONNX does not have: an orthogonal one is a matrix exponential, or the solution of a
linear system. A file holds fixed weights, so that their values do as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fxinvert.passes.capture import attribute


def with_values(program: ExportedProgram) -> fx.GraphModule:
    """A captured model that holds the values of what it computes from parameters and buffers alone."""
    module: Any = program.module()
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = attribute(module, node.target)
        elif node.op == "call_function" and node.all_input_nodes and known.keys() >= {*node.all_input_nodes}:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if node.op == "call_function" and isinstance(value, Tensor) and not known.keys() >= {*node.users}:
            name = f"computed_{node.name}"
            module.register_buffer(name, value)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module  # type: ignore[no-any-return]
