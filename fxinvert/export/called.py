"""How a model is called: inputs and outputs of any form, as flat lists of named tensors with named axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxinvert.errors import DataError, TraceError
from fxinvert.passes.inputs import Flat, Inputs
from fxinvert.passes.outputs import item_of, names_of

BATCH = "batch"
"""Name of the axis that dimension 0 of every input has unless told otherwise."""

Axes = Mapping[str, Mapping[int, str | None]]
"""Names of dimensions, by the input's name and the dimension."""


@dataclass(frozen=True)
class Call:
    """How a model is called, and an example of it.

    Attributes:
        inputs: the form of the call; it names the tensors.
        example: the tensors, in order, on the CPU.
        axes: the named dimensions of each.
    """

    inputs: Inputs
    example: tuple[Tensor, ...]
    axes: tuple[dict[int, str], ...]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, axes: Axes | None = None) -> Call:
        """The call that an example shows.

        Args:
            model: The model.
            example_inputs: A tensor, the tuple of what `forward` takes by position, or the mapping of what it takes by
                name; nested in tuples, lists and dicts as the model wants them.
            axes: Names of dimensions whose size may vary, by input; `None` for a dimension 0 that is not the batch.

        Raises:
            DataError: `forward` does not take such inputs, a tensor has no rows, or sizes do not agree.
        """
        try:
            inputs = Inputs.of(model.forward, example_inputs)
            values = inputs.tensors(example_inputs)
        except TraceError as error:
            raise DataError(f"the example inputs do not fit {type(model).__name__}: {error}") from error
        example = tuple(value.detach().cpu() for value in values)
        named = _named_axes(inputs.names, example, axes or {})
        call = cls(inputs, example, named)
        if not call.sizes:
            shapes = ", ".join(
                f"{name} {list(value.shape)}" for name, value in zip(inputs.names, example, strict=True)
            )
            raise DataError(
                f"no example input has an axis that varies ({shapes}): dimension 0 must be the batch"
            )
        return call

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each named axis in the example.

        Raises:
            DataError: An axis has two sizes, or none.
        """
        found: dict[str, tuple[int, str]] = {}
        for name, tensor, axes in zip(self.inputs.names, self.example, self.axes, strict=True):
            for dimension, axis in axes.items():
                size = tensor.shape[dimension]
                if not size:
                    raise DataError(
                        f"example input {name!r} has shape {tuple(tensor.shape)}: {axis} needs at least one entry"
                    )
                known, first = found.setdefault(axis, (size, name))
                if known != size:
                    raise DataError(
                        f"the example inputs must share their {axis} size; {first!r} has {known}, {name!r} has {size}. "
                        f"A dimension 0 that is no batch: dynamic_axes={{{name!r}: {{0: None}}}}"
                    )
        return {axis: size for axis, (size, _) in found.items()}

    def flat(self, model: nn.Module) -> Flat:
        """The model as a function of the tensors that gives a flat tuple of tensors."""
        return Flat(model, self.inputs, lambda result: tuple(outputs_by_name(result).values()))

    def output_names(self, result: Any) -> tuple[str, ...]:
        """The names of a result's tensors, none of them an input's."""
        return tuple(f"{name}_out" if name in self.inputs.names else name for name in outputs_by_name(result))


def outputs_by_name(result: Any) -> dict[str, Tensor]:
    """The tensors in what a model returns, by name: keys and fields, and `output_0` for what has only a number.

    Args:
        result: A tensor, or tuples, lists, mappings and dataclasses of tensors. `None` is skipped, and so is what a
            dataclass holds beside tensors, such as the cache of a language model.

    Raises:
        DataError: Something else is among them, or two would have the same name.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in _named_tensors(result, "output"):
        if name in named:
            raise DataError(
                f"two outputs of the model would be called {name!r}; rename a key of what it returns"
            )
        named[name] = tensor
    if not named:
        raise DataError(f"the model returned no tensor ({described(result)}): there is nothing to export")
    return named


def described(value: Any) -> str:
    """The type of a value, with the types of what a tuple or list holds."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if value is None:
        return
    keys = names_of(value)
    if not keys and not isinstance(value, (tuple, list, Mapping)):
        raise DataError(
            f"the model returns {described(value)}: only tensors, and tuples, lists, dicts and dataclasses of them, "
            "can be exported"
        )
    for key in keys:
        own, item = isinstance(key, str) and name == "output", item_of(value, key)
        beside = dataclasses.is_dataclass(value) and not isinstance(item, (Tensor, tuple, list, Mapping))
        if beside and not dataclasses.is_dataclass(item):
            continue
        yield from _named_tensors(item, str(key) if own else f"{name}_{key}")


def _named_axes(names: Sequence[str], values: Sequence[Tensor], given: Axes) -> tuple[dict[int, str], ...]:
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise DataError(f"dynamic_axes names {unknown!r}, which is no input; the inputs: {', '.join(names)}")
    found = []
    for name, value in zip(names, values, strict=True):
        axes: dict[int, str | None] = {0: BATCH} if value.dim() else {}
        for dimension, axis in given.get(name, {}).items():
            if not isinstance(dimension, int) or not 0 <= dimension < value.dim():
                raise DataError(
                    f"dynamic_axes: input {name!r} has {value.dim()} dimensions, so none with number {dimension!r}"
                )
            if axis is not None and not (isinstance(axis, str) and axis.isidentifier()):
                raise DataError(
                    f"dynamic_axes: {axis!r} is no name; letters, digits and underscores are needed"
                )
            axes[dimension] = axis
        found.append({dimension: axis for dimension, axis in axes.items() if axis is not None})
    return tuple(found)


class Half(nn.Module):
    """A flat model in half precision that takes and gives what the model itself does."""

    def __init__(self, flat: Flat, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.flat, self.dtypes = flat.half(), tuple(dtypes)

    def forward(self, *values: Any) -> Any:
        given = (value.half() if value.is_floating_point() else value for value in values)
        outputs = self.flat(*given)
        return tuple(value.to(dtype) for value, dtype in zip(outputs, self.dtypes, strict=True))
