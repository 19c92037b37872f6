"""Parts: ops that give several tensors, as the ops that give one of them each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

aten = torch.ops.aten

#: a call, without the input that is split: the op and its arguments
Part = tuple[Any, tuple[Any, ...]]


def _slices(sizes: list[int], dim: int) -> list[Part]:
    ends = list(accumulate(sizes))
    return [(aten.slice.Tensor, (dim, end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _pieces(value: Any, dim: int) -> list[Part]:
    return _slices([part.shape[dim] for part in value], dim)


def _layers(value: Any, dim: int) -> list[Part]:
    return [(aten.select.int, (dim, i)) for i in range(len(value))]


#: key of the op → (its value in the example run, its axis) → one call for every tensor
SPLITS: dict[str, Callable[[Any, int], list[Part]]] = {
    "chunk": _pieces,
    "split": _pieces,
    "split_with_sizes": _pieces,
    "tensor_split": _pieces,
    "unsafe_chunk": _pieces,
    "unsafe_split": _pieces,
    "unbind": _layers,
}


def parts(key: str, value: Any, arguments: dict[str, Any]) -> list[Part]:
    """The calls that give an op's tensors one by one.

    Args:
        key: the op, one of `SPLITS`.
        value: what it gives for the example.
        arguments: by name, `dim` among them.
    """
    return SPLITS[key](value, int(arguments.get("dim", 0)))
