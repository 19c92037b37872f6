"""Which of a model's outputs is supervised."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import TraceError

Key = int | str


@dataclasses.dataclass(frozen=True)
class Head:
    """One of several supervised outputs: its index or name, and its shape without the batch."""

    key: Key
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has per sample."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Takes the supervised output of what a model returns, or of what stands for it while it is traced.

    Attributes:
        keys: index or name of the output; several are flattened and joined, `(B, …)` each → `(B, sum)`; none: the
            model returns a single tensor.
    """

    keys: tuple[Key, ...]

    @classmethod
    def of(cls, values: Any, output: Key | tuple[Key, ...] | list[Key] | None) -> Chosen:
        """The choice for a model that returns `values`.

        Raises:
            TraceError: there are several and none is named, or there is no such output.
        """
        if isinstance(values, Tensor):
            if output not in (None, 0):
                raise TraceError(f"the model has no output {output!r}; it returns a single tensor")
            return cls(())
        tensors = [name for name in names_of(values) if isinstance(item_of(values, name), Tensor)]
        if not tensors:
            raise TraceError(
                f"the model returns {type(values).__name__}; a tensor, or a tuple, list, dict or dataclass of tensors "
                "is needed"
            )
        keys = tuple(output) if isinstance(output, tuple | list) else (output,)
        listed = ", ".join(map(repr, tensors))
        if output is None:
            keys = (_default(values, tensors, listed),)
        # an index is as good as a name
        named = tuple(
            tensors[k] if isinstance(k, int) and k not in tensors and -1 < k < len(tensors) else k
            for k in keys
        )
        for key in named:
            if key not in tensors:
                raise TraceError(f"the model has no output {key!r}; it returns {listed}")
        return cls(named)  # type: ignore[arg-type]

    @property
    def whole(self) -> bool:
        """Whether the model returns a single tensor, and that is it."""
        return not self.keys

    def heads(self, values: Any) -> tuple[Head, ...]:
        """The outputs that are joined; none where there is only one."""
        if len(self.keys) < 2:
            return ()
        return tuple(Head(key, tuple(item_of(values, key).shape[1:])) for key in self.keys)

    def __call__(self, values: Any) -> Any:
        if not self.keys:
            return values
        if len(self.keys) == 1:
            return item_of(values, self.keys[0])
        return torch.cat([torch.flatten(item_of(values, key), 1) for key in self.keys], 1)


def _default(values: Any, tensors: list[Key], listed: str) -> Key:
    """The only output; of a dataclass, as `transformers` returns, the logits or else the first.

    Raises:
        TraceError: there are several.
    """
    if len(tensors) > 1 and not dataclasses.is_dataclass(values):
        raise TraceError(
            f"the model returns {len(tensors)} outputs ({listed}); "
            f"name the one that the labels are for, e.g. output={tensors[0]!r}"
        )
    return "logits" if "logits" in tensors else tensors[0]


def names_of(values: Any) -> list[Key]:
    """The names or numbers of what a mapping, dataclass, tuple or list holds; none for anything else."""
    if isinstance(values, Mapping):
        return list(values)
    if dataclasses.is_dataclass(values):
        return [field.name for field in dataclasses.fields(values)]
    return list(range(len(values))) if isinstance(values, tuple | list) else []


def item_of(values: Any, key: Key) -> Any:
    """What a mapping, dataclass, tuple or list holds under a name or number."""
    by_name = isinstance(key, str) and not isinstance(values, Mapping) and dataclasses.is_dataclass(values)
    return getattr(values, str(key)) if by_name else values[key]
