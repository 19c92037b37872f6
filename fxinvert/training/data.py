"""Training data as it is used: checked batch by batch, streamed, a part of it kept aside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxinvert.errors import DataError

#: one sample in this many is kept aside
HELD_OUT = 5


class Batch(NamedTuple):
    """Inputs of the model, each `(B, …)`, and labels."""

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.inputs[0])

    def select(self, rows: Tensor) -> Batch:
        """The samples where `rows` `(B,)` is True."""
        return Batch(tuple(value[rows] for value in self.inputs), self.labels[rows])


class Batches:
    """Batches of `(inputs, labels)`, checked while they stream; can be iterated any number of times.

    Args:
        source: any iterable of pairs that can be iterated more than once: a list, a `DataLoader`.
        device: where the batches go.
        what: how messages call the data.
        part: which samples to give: all, those kept aside ("held_out"), or the others ("train").

    A sample is kept aside by its content: the same ones in every pass, however the loader shuffles, and copies of a
    sample always on the same side.

    Raises:
        DataError: on iteration: not pairs of tensors, empty, not finite, or lengths that differ.
    """

    def __init__(
        self, source: Iterable[Any], device: torch.device, what: str = "train_data", part: str = "all"
    ) -> None:
        if isinstance(source, Iterator):
            raise DataError(
                f"{what} can be iterated only once ({type(source).__name__}); "
                "post-training passes over it several times: give a list or a DataLoader"
            )
        if not isinstance(source, Iterable):
            raise DataError(
                f"{what} is {type(source).__name__}; an iterable of (inputs, labels) batches is needed"
            )
        self.source, self.device, self.what, self.part = source, device, what, part

    def of(self, part: str) -> Batches:
        """The same data, another part."""
        return Batches(self.source, self.device, self.what, part)

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for index, item in enumerate(self.source):
            batch = self._checked(item, index)
            empty = False
            if self.part != "all":
                batch = batch.select(kept_aside(batch.inputs[0]) == (self.part == "held_out"))
            if len(batch):
                yield batch
        if empty:
            raise DataError(f"{self.what} has no batches; it is empty, or it can be iterated only once")

    def _checked(self, item: Any, index: int) -> Batch:
        where = f"batch {index} of {self.what}"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{where} is {type(item).__name__}; a pair (inputs, labels) is needed")
        inputs, labels = item
        inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        for name, value in [*((f"input {i}", value) for i, value in enumerate(inputs)), ("labels", labels)]:
            if not isinstance(value, Tensor):
                raise DataError(f"{where}: {name} is {type(value).__name__}; a tensor is needed")
            if value.dim() == 0 or len(value) != len(inputs[0]):
                raise DataError(
                    f"{where}: {name} has shape {tuple(value.shape)}, input 0 {tuple(inputs[0].shape)}; "
                    "they must have the same number of samples"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                rows = (
                    (~torch.isfinite(value)).flatten(1).any(1) if value.dim() > 1 else ~torch.isfinite(value)
                )
                raise DataError(
                    f"{where}: {name} has NaN or infinite values in {int(rows.sum())} samples, "
                    f"first in sample {int(rows.nonzero()[0])}"
                )
        return Batch(tuple(value.to(self.device) for value in inputs), labels.to(self.device))


def kept_aside(samples: Tensor) -> Tensor:
    """Which samples are kept aside, from a hash of their content: `(B, …)` → `(B,)` bool.

    The sum of the sample's bits, as integers, times odd pseudo-random numbers, modulo 2⁶⁴: exact, so that a sample's
    side does not depend on its batch or device.
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[samples.element_size()]
    bits = (
        samples.contiguous().view(words).flatten(1).long()
        if samples.dim() > 1
        else samples.view(words)[:, None].long()
    )
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) * 2 + 1
    mixed = (bits * odd.to(bits.device)).sum(1)
    # the highest bits depend on all of the words
    return ((mixed >> 40) & 0xFFFFFF) % HELD_OUT == 0
