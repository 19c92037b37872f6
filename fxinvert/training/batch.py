"""A batch: inputs and labels, checked, whatever structure (tuple, dict, …) their tensors come in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxinvert.errors import DataError

#: bytes that torch's own allocations are aligned to; kernels may round differently elsewhere
ALIGNMENT = 64

#: a model's arguments, by position or by name: tensors `(B, …)`, nested in any containers
Arguments = tuple[Any, ...] | Mapping[str, Any]

#: how a mapping that holds inputs and labels names the labels, as loaders of the transformers library do
LABELS = ("labels", "label")

#: by name, what inputs and labels are, in words, and the shape of inputs without the batch's axis
Types = dict[str, tuple[str, tuple[int, ...]]]


class Batch(NamedTuple):
    """The model's arguments and the labels: tensors `(B, …)`, nested in any containers."""

    inputs: Arguments
    labels: Any

    def __len__(self) -> int:
        return len(tensors_of(self.inputs)[0])

    def select(self, rows: Tensor | slice) -> Batch:
        """The samples where `rows` `(B,)` is True, or with these numbers; those of a slice are views."""
        return self.map(lambda value: value[rows])

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, every tensor aligned in memory as if it had been made there."""
        return self.map(lambda value: _aligned(value.to(device)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function applied to every tensor."""
        return Batch(*pytree.tree_map(function, (self.inputs, self.labels)))


def tensors_of(structure: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dictionaries, in order."""
    return pytree.tree_leaves(structure)


def checked(item: Any, where: str) -> Batch:
    """A loader's item as a batch.

    Args:
        item: a pair (inputs, labels), of tensors or arrays, or of what numpy makes arrays of, as of data frames; arrays become
            tensors that share their memory. Or one mapping of both by name, with the labels under one of `LABELS`.
        where: how messages call it, e.g. "batch 3 of train_data".

    Labels of k entries for each sample, one after another, as a model gives k rows of outputs, become `(B, k, …)`.

    Raises:
        DataError: it is no pair of (structures of) tensors, it is empty, their lengths differ, or a value is not finite.
    """
    item = _parted(item)
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(
            f"{where} is {_listed(item)}; a pair (inputs, labels) is needed, each a tensor or a mapping of tensors by name, "
            "several inputs as a tuple, or one mapping of both with the labels as 'labels': a collate_fn or a generator "
            "function brings batches into that form"
        )
    # mappings of other types, such as those of tokenizers, are leaves to pytree
    inputs, labels = pytree.tree_map(
        _as_tensor, tuple(dict(p) if isinstance(p, Mapping) else p for p in item)
    )
    if not isinstance(inputs, Mapping):  # by name
        inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not tensors_of(inputs):
        raise DataError(f"{where} has no inputs, only labels")
    labels = labels_by_sample(labels, tensors_of(inputs)[0])
    named = [*_named("input", inputs), *_named("labels", labels)]
    first = next((value for _, value in named if isinstance(value, Tensor)), None)
    for name, value in named:
        if isinstance(value, np.ndarray):
            raise DataError(
                f"{where}: {name} is an array of {value.dtype}, which is no type of torch: give numbers or truth values"
            )
        if not isinstance(value, Tensor):
            raise DataError(
                f"{where}: {name} is {type(value).__name__}; a tensor is needed, with an entry for each sample of the batch "
                "(what is the same for all samples belongs in the model, as a default or a setting; single samples are "
                "made batches by a DataLoader)"
            )
        if value.layout != torch.strided:
            raise DataError(
                f"{where}: {name} is of layout {value.layout}; give the dense tensor, .to_dense()"
            )
        if value.dim() == 0 or first is None or first.dim() == 0 or len(value) != len(first):
            advice = "" if value.dim() else "; single samples are made batches by a DataLoader"
            other = "none" if first is None else str(tuple(first.shape))
            raise DataError(
                f"{where}: {name} has shape {tuple(value.shape)}, input 0 {other}; "
                f"along the first axis they must have the same number of samples{advice}"
            )
        if not len(value):
            raise DataError(f"{where} has no samples")
        if value.is_floating_point() and not _finite(value):
            rows = (~torch.isfinite(value)).reshape(len(value), -1).any(1)
            raise DataError(
                f"{where}: {name} has NaN or infinite values in {int(rows.sum())} samples, "
                f"first in sample {int(rows.nonzero()[0])}; leave these out, or fill in what is missing"
            )
    return Batch(inputs, labels)


def labels_by_sample(labels: Any, first: Any) -> Any:
    """Labels of which some have several entries for each sample, one after another, `(B·k, …)`; they become `(B, k, …)`.

    Args:
        labels: nested tensors.
        first: the first input, `(B, …)`.
    """

    def apart(own: Any) -> Any:
        if not all(isinstance(v, Tensor) and v.layout == torch.strided and v.dim() for v in (own, first)):
            return own
        each, rest = divmod(len(own), max(len(first), 1))
        return own if rest or each < 2 else torch.unflatten(own, 0, (-1, each))

    return pytree.tree_map(apart, labels)


def check_alike(batch: Batch, theirs: Types, where: str, what: str) -> None:
    """Checks that a batch is like another: inputs of equal names, dtypes and shapes, labels of one kind.

    Args:
        batch: as `checked` gave it.
        theirs: the other one's `types_of`.
        where: how messages call the batch.
        what: how they call the other one.

    Raises:
        DataError: it has not.
    """
    ours, unlike = types_of(batch), ("not there", ())
    for name in {**ours, **theirs}:
        (own, shape), (other, wanted) = ours.get(name, unlike), theirs.get(name, unlike)
        if own != other:
            raise DataError(f"{where}: {name}: {own}; {what} has there: {other}")
        if shape != wanted:
            given, expected = (
                f"({', '.join(map(str, (*sizes,)))})" for sizes in ((len(batch), *shape), ("B", *wanted))
            )
            raise DataError(
                f"{where}: {name} has shape {given}; the model was traced with {expected}, as {what} has it: bring all batches "
                "to one shape, texts by padding to a fixed length, images by a resize or crop"
            )


def types_of(batch: Batch) -> Types:
    """Dtypes, numbers of axes and shapes of inputs, and kinds of labels."""
    inputs = {
        name: (f"{str(value.dtype).removeprefix('torch.')} with {value.dim()} axes", tuple(value.shape[1:]))
        for name, value in _named("input", batch.inputs)
    }
    return inputs | {name: (_kind(value), ()) for name, value in _named("labels", batch.labels)}


def _kind(labels: Tensor) -> str:
    """What labels ask for, by their type."""
    if labels.dtype == torch.bool:
        return "truth values"
    return "floating-point numbers" if labels.is_floating_point() else "integers"


def is_array(value: Any) -> bool:
    """Whether a value is a tensor or an array, or numpy makes an array of it."""
    return hasattr(value, "__array__")


def _parted(item: Any) -> Any:
    """A mapping of inputs and labels as the pair of both; anything else as it is."""
    named = [name for name in LABELS if name in item] if isinstance(item, Mapping) else []
    if len(named) != 1:
        return item
    return {name: value for name, value in item.items() if name != named[0]}, item[named[0]]


def _listed(item: Any) -> str:
    """What is no pair, in words."""
    kind = type(item).__name__
    if isinstance(item, Mapping):
        return f"{kind} with {', '.join(map(str, item))}"
    return f"{kind} of {len(item)}" if isinstance(item, tuple | list) else kind


def _as_tensor(value: Any) -> Any:
    if is_array(value) and not isinstance(value, Tensor):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return value
    if min(value.strides, default=0) < 0 or not value.dtype.isnative:  # reversed, or of another byte order
        value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
    with warnings.catch_warnings():  # of arrays that are read-only: nothing is written to batches
        warnings.simplefilter("ignore", UserWarning)
        return torch.as_tensor(value)


def _named(what: str, structure: Any) -> list[tuple[str, Any]]:
    """The leaves with names: `labels`, `labels['steering']`, `input 0`."""
    leaves, _ = pytree.tree_flatten_with_path(structure)
    named = []
    for path, value in leaves:
        keys = pytree.keystr(path)
        if what == "input" and path:
            number = pytree.keystr(path[:1]).strip("[]")
            named.append((f"input {number}{pytree.keystr(path[1:])}", value))
        else:
            named.append((f"{what}{keys}", value))
    return named


def _finite(value: Tensor) -> bool:
    # a sum is finite only if every number is; one that overflows says nothing
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _aligned(value: Tensor) -> Tensor:
    return value if value.data_ptr() % ALIGNMENT == 0 else value.clone()
