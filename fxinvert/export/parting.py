"""Where a file and a model part: the first node whose value the other side does not have.

Exporters and optimizers rename, fuse and fold, so that values are matched by what they are, not by what they are called. A
node whose value has no match is fused if something that follows from it has one; it is where the two part if nothing
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxinvert.errors import FxInvertError, TraceError
from fxinvert.export.compare import Array
from fxinvert.export.inputs import Case
from fxinvert.export.session import open_session, run_values
from fxinvert.quiet import quiet

N = TypeVar("N")

#: files beyond this are not taken apart: with all values as outputs they would have to be written again
BYTES = 1_000_000_000


def first_difference(path: Path, flat: nn.Module, case: Case, *, atol: float, rtol: float) -> str:
    """Names the first node of the model, and of the file, whose value the other does not have.

    Args:
        path: The file.
        flat: The frozen model as a function of the case's tensors.
        case: Inputs at which the two differ.
        atol: Absolute tolerance.
        rtol: Relative tolerance.

    Returns:
        A sentence; it says why, where no node can be named.
    """
    try:
        model, torch_values = _torch_values(flat, case)
        file, file_values = _file_values(path, case)
    except FxInvertError as error:
        return f"Where the two part is not known: {error}"

    def close(a: Array, b: Array) -> bool:
        return bool(np.allclose(a.reshape(-1), b.reshape(-1), rtol=rtol, atol=atol, equal_nan=True))

    ours = _unmatched(
        model, torch_values, list(file_values.values()), lambda node: node.all_input_nodes, close
    )
    theirs = _unmatched(file, file_values, list(torch_values.values()), lambda name: file[name], close)
    parts = [f"{_described(ours)} of the model"] if ours is not None else []
    parts += [f"{_node_of(path, theirs)} of the file"] if theirs is not None else []
    if not parts:
        return (
            "Run without onnxruntime's optimizations, the file has every value of the model: what differs is rounding, or its "
            "outputs are in another order."
        )
    text = f"The first node where the two differ: {', '.join(parts)}"
    shared = file_values.get(ours.name) if ours is not None else None
    own = torch_values.get(ours) if ours is not None else None
    if shared is not None and own is not None and shared.shape == own.shape:
        text += f", by up to {float(np.abs(shared - own).max()):.3g}"
    return f"{text}."


def _unmatched(
    order: Iterable[N],
    values: Mapping[N, Array],
    others: Sequence[Array],
    inputs: Callable[[N], Iterable[N]],
    close: Callable[[Array, Array], bool],
) -> N | None:
    """The first node in order whose value, and whatever follows from it, has no match among the others."""
    by_size: dict[int, list[Array]] = {}
    for value in others:
        by_size.setdefault(value.size, []).append(value)
    nodes = list(order)
    alive: set[N] = set()  # what leads to a match
    for node in reversed(nodes):
        matched = node in values and any(close(values[node], v) for v in by_size.get(values[node].size, ()))
        if matched or node in alive:
            alive.add(node)
            alive.update(inputs(node))
    return next((node for node in nodes if node in values and node not in alive), None)


def _torch_values(flat: nn.Module, case: Case) -> tuple[list[fx.Node], dict[fx.Node, Array]]:
    """The nodes of the model's graph at the case's sizes, and those of their values that are arrays of real numbers."""
    given = tuple(case.inputs.values())
    try:
        with quiet():
            graph = torch.export.export(flat, given, strict=False).module()
    except Exception as error:
        raise TraceError(f"torch.export cannot follow the model ({type(error).__name__})") from error
    assert isinstance(graph, fx.GraphModule)
    kept: dict[fx.Node, Array] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            real = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
            if n.op not in ("placeholder", "get_attr") and real:
                kept[n] = value.detach().contiguous().numpy().copy()
            return value

    with torch.no_grad():
        Recorder(graph).run(*given)
    return list(graph.graph.nodes), kept


def _file_values(path: Path, case: Case) -> tuple[dict[str, list[str]], dict[str, Array]]:
    """What every value of the file's graph is computed from, in order, and the values that are arrays of real numbers."""
    import onnx

    model = onnx.load(str(path))
    if model.ByteSize() > BYTES:
        raise FxInvertError(f"files beyond {BYTES:.0e} bytes are not taken apart")
    made = {name: list(node.input) for node in model.graph.node for name in node.output if name}
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in known)
    session = open_session(model.SerializeToString(), path, "DISABLE_ALL")
    inner = {value.name for value in model.graph.input}
    return {name: [i for i in inputs if i in made] for name, inputs in made.items()}, {
        name: value for name, value in run_values(session, case, path).items() if name not in inner
    }


def _described(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = str(stack[-1][0]).removeprefix("model").removeprefix(".") if stack else ""
    inside = f" in module {module!r}" if module else ""
    return f"{node.name!r} ({node.target}{inside})"


def _node_of(path: Path, value: str) -> str:
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    node = next(node for node in nodes if value in node.output)
    return f"node {node.name or value!r} ({node.op_type})"
