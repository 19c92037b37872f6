"""What the file says about itself: facts on the model, the segment on each node."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxinvert.errors import DataError

PREFIX = "fxinvert."
SCOPES = "pkg.torch.onnx.name_scopes"
TRACE = "pkg.torch.onnx.stack_trace"


def set_metadata(model: Any, facts: Mapping[str, str]) -> None:
    """Store facts on the model, and drop torch's stack traces from the nodes.

    The traces hold paths of the machine that exported: they are nobody's business, and the same model would give another
    file elsewhere.

    Args:
        model: The `onnx_ir.Model`.
        facts: Keys and values.
    """
    model.metadata_props.update(facts)
    for node in model.graph.all_nodes():
        node.metadata_props.pop(TRACE, None)


def every_name(model: nn.Module, segments: Mapping[str, str]) -> dict[str, str]:
    """`segments` for every name that a parameter or buffer has, so that a tied one is known by all of them.

    Args:
        model: The model.
        segments: Segment by parameter (or buffer) name.

    Returns:
        Segment by name, in the model's order.

    Raises:
        DataError: A name is not in the model.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for name in segments:
        if name not in tensors:
            raise DataError(
                f"segments names {name!r}, which is no parameter of the model; its names: {list(tensors)[:8]}…"
            )
    by_tensor = {id(tensors[name]): segment for name, segment in segments.items()}
    return {name: by_tensor[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_tensor}


def annotate_segments(model: Any, segments: Mapping[str, str]) -> None:
    """Name the segment on every node that uses one of its parameters.

    The module that a node came from decides, and the name of the weight only where the module does not tell: the optimizer
    transposes, folds and renames weights, and lets equal ones share one name (two layers initialized alike).

    Args:
        model: The `onnx_ir.Model`.
        segments: Segment by parameter name.
    """
    by_module = {name.rpartition(".")[0]: segment for name, segment in segments.items()}
    by_module.pop("", None)
    for node in model.graph.all_nodes():
        weights = [value.name for value in node.inputs if _is_weight(value)]
        if not weights:
            continue
        scopes = _scopes(node.metadata_props.get(SCOPES, "[]"))
        found = [by_module[scope] for scope in reversed(scopes) if scope in by_module]
        found += [segments[name] for name in weights if name in segments]
        if found:
            node.metadata_props[f"{PREFIX}segment"] = found[0]


def _is_weight(value: Any) -> bool:
    """Whether a node's input holds weights, and not a shape or a scalar constant."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.size > 1
    )


def _scopes(text: str) -> list[str]:
    """Module paths of a node, outermost first, as torch writes them; none if torch wrote something else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []
