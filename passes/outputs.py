"""Which of a model's outputs is supervised."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import TraceError

Key = int | str
#: the output that is supervised where none is named
LOGITS = "logits"
#: what no labels are for, if there is anything else
LOSS = "loss"


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
        keys: index or name of the output, `"maps.0"` in what is nested; several are flattened and joined, `(B, …)` each
            → `(B, sum)`; none: the model returns a single tensor.
        ways: the keys that lead to each.
        guessed: all that there are, in words, where none was named and the first was taken.
    """

    keys: tuple[Key, ...]
    ways: tuple[tuple[Key, ...], ...] = ()
    guessed: str = ""

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
        ways = _ways(values)
        tensors = list(ways)
        if not tensors:
            raise TraceError(
                f"the model returns {type(values).__name__}{_empty(values)}; a tensor, or a tuple, list, dict or "
                "dataclass of tensors is needed"
            )
        keys = tuple(output) if isinstance(output, tuple | list) else (output,)
        listed = ", ".join(map(repr, tensors))
        if output is None:
            plain = [key for key, way in ways.items() if len(way) == 1]
            keys = (_default(values, plain or tensors, listed),)
        # an index is as good as a name
        named = tuple(
            tensors[k] if isinstance(k, int) and k not in tensors and -1 < k < len(tensors) else k
            for k in keys
        )
        for key in named:
            if key not in tensors:
                raise TraceError(f"the model has no output {key!r}; it returns {listed}")
        guessed = listed if output is None and len(ways) > 1 and named != (LOGITS,) else ""
        return cls(named, tuple(ways[key] for key in named), guessed)  # type: ignore[arg-type, index]

    def with_rows(self, values: Any, more: Any) -> Chosen:
        """The first output of real numbers with a row for every sample in place of one that was guessed and has none.

        Args:
            values: what the model returns.
            more: what it returns for twice the samples.
        """

        def has_rows(way: tuple[Key, ...]) -> bool:
            few, many = (reduce(item_of, way, v) for v in (values, more))
            real = few.dim() > 0 and few.is_floating_point()
            return bool(real and many.shape == (2 * len(few), *few.shape[1:]))

        ways = _ways(values)
        keys = [*self.keys, *(key for key, way in ways.items() if len(way) == 1 and key != LOSS)]
        own = next((key for key in keys if has_rows(ways[key])), self.keys[0])
        return dataclasses.replace(self, keys=(own,), ways=(ways[own],))

    @property
    def whole(self) -> bool:
        """Whether the model returns a single tensor, and that is it."""
        return not self.keys

    def heads(self, values: Any) -> tuple[Head, ...]:
        """The outputs that are joined; none where there is only one."""
        if len(self.keys) < 2:
            return ()
        parts = zip(self.keys, self._parts(values), strict=True)
        return tuple(Head(key, tuple(part.shape[1:])) for key, part in parts)

    def __call__(self, values: Any) -> Any:
        if not self.keys:
            return values
        first, *others = self._parts(values)
        return torch.cat([torch.flatten(part, 1) for part in (first, *others)], 1) if others else first

    def _parts(self, values: Any) -> list[Any]:
        return [reduce(item_of, way, values) for way in self.ways]


def _ways(values: Any) -> dict[Key, tuple[Key, ...]]:
    """The tensors that a container holds, in containers of its own, too: their names, and the keys that lead there."""
    found: dict[Key, tuple[Key, ...]] = {}
    for key in names_of(values):
        item = item_of(values, key)
        if isinstance(item, Tensor):
            found[key] = (key,)
        else:
            found |= {f"{key}.{name}": (key, *way) for name, way in _ways(item).items()}
    return found


def _empty(values: Any) -> str:
    """Which of the containers that a container without tensors holds are empty, in words."""
    items = ((key, item_of(values, key)) for key in names_of(values))
    empty = [repr(key) for key, item in items if isinstance(item, tuple | list | Mapping) and not item]
    return f", in which {', '.join(empty)} is empty" if empty else ""


def _default(values: Any, tensors: list[Key], listed: str) -> Key:
    """The only output; of a dataclass, as `transformers` returns, the logits or else the first that is no loss.

    Raises:
        TraceError: there are several.
    """
    if len(tensors) > 1 and not dataclasses.is_dataclass(values):
        raise TraceError(
            f"the model returns {len(tensors)} outputs ({listed}); "
            f"name the one that the labels are for, e.g. output={tensors[0]!r}"
        )
    return LOGITS if LOGITS in tensors else next((key for key in tensors if key != LOSS), LOSS)


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
