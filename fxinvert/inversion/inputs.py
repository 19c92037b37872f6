"""Inputs of an inverse graph, compared with those that its model was traced with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fxinvert.errors import DataError


def other_types(nodes: Sequence[fx.Node], given: Sequence[Any]) -> str:
    """What a message says of inputs of another type than the model was traced with."""
    pairs = (
        (n.meta["path"], n.meta["tensor_meta"].dtype, v.dtype) for n, v in zip(nodes, given, strict=True)
    )
    return "".join(
        f"; input {path!r} is {own}, and {traced} was traced" for path, traced, own in pairs if own != traced
    )


def check_shape(node: fx.Node, value: Any) -> None:
    """Checks that an input has the shape that the model was traced with, but for the number of samples.

    Raises:
        DataError: it has another.
    """
    meta = node.meta.get("tensor_meta")
    if meta is None or (isinstance(value, Tensor) and value.dim() and value.shape[1:] == meta.shape[1:]):
        return
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    expected = ", ".join(map(str, ("B", *meta.shape[1:])))
    raise DataError(f"input {node.meta['path']!r} has shape {shape}; the model was traced with ({expected})")
