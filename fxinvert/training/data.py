"""Training data as it is used: checked batch by batch, streamed, a part of it kept aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from fxinvert.errors import DataError
from fxinvert.labels import asks
from fxinvert.training.batch import Batch, checked, is_array
from fxinvert.training.fingerprint import Fingerprint, fingerprint

Part = Literal["all", "train", "held_out"]
#: samples per batch of data that come without batches
BATCH = 256


class Batches:
    """Batches of `(inputs, labels)`, checked while they stream; can be iterated any number of times.

    Args:
        source: any iterable of pairs that can be iterated more than once: a list, a `DataLoader`.
        device: where the batches go.
        what: how messages call the data.
        part: which samples to give: all, those kept aside ("held_out"), or the others ("train").
        first: the number of the first batch, for messages.
        check: is shown every batch, and how messages call it, to refuse it.

    Attributes:
        fingerprint: of all samples, whatever the part, in the last whole pass.
        asked: whether any label seen so far asks for something.
        at: how messages call the batch that was given last; empty before the first and after the last.

    A sample is kept aside by its content: the same ones in every pass, however the loader shuffles, and copies of a
    sample always on the same side.

    Raises:
        DataError: on iteration: not pairs of tensors, empty, not finite, or lengths that differ.
    """

    def __init__(
        self,
        source: Iterable[Any],
        device: torch.device,
        what: str = "train_data",
        part: Part = "all",
        first: int = 0,
        check: Callable[[Batch, str], None] | None = None,
    ) -> None:
        self.source, self.device, self.what = batched(source, what), device, what
        self.part, self.first, self.check = part, first, check
        self.fingerprint, self.asked, self.at = Fingerprint(), False, ""

    def of(self, part: Part) -> Batches:
        """The same data, another part."""
        return Batches(self.source, self.device, self.what, part, self.first, self.check)

    def __iter__(self) -> Iterator[Batch]:
        seen, empty = Fingerprint(), True
        for index, item in enumerate(self.source):
            where = f"batch {self.first + index} of {self.what}"
            batch = checked(item, where)
            if self.check is not None:
                self.check(batch, where)
            empty = False
            self.asked = self.asked or asks(batch.labels)
            own, aside = fingerprint(batch, index)
            seen += own
            if self.part != "all":
                batch = batch.select(aside == (self.part == "held_out"))
            if len(batch):
                self.at = where
                yield batch.to(self.device)
        self.at = ""
        if empty:
            raise no_batches(self.what)
        self.fingerprint = seen


def first_batch(beginning: Iterable[Any], what: str, rows: int, device: torch.device) -> Batch:
    """The first samples of data, at most `rows` of them and of the first batch.

    Args:
        beginning: of the data.
        what: how messages call the data.
        rows: how many.
        device: where they go.

    Raises:
        DataError: there are none.
    """
    for item in beginning:
        return checked(item, f"batch 0 of {what}").select(slice(rows)).to(device)
    raise no_batches(what)


def no_batches(what: str) -> DataError:
    """What to raise where data that are called so give nothing."""
    return DataError(f"{what} has no batches; it is empty, or it can be iterated only once")


class Begun:
    """Data whose beginning can be looked at before the first pass, which goes on from there: no pass is lost to looking.

    Args:
        source: any iterable that can be iterated more than once.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source
        self._seen: list[Any] = []
        self._rest: Iterator[Any] | None = None

    @property
    def beginning(self) -> Iterable[Any]:
        """What a first pass gives; can be iterated as far as one likes, as often as one likes, until there is one."""
        return _Beginning(self)

    def _look(self) -> Iterator[Any]:
        if self._rest is None:
            self._rest = iter(self.source)
        for i in count():
            if i == len(self._seen):
                self._seen += islice(self._rest, 1)
            if i == len(self._seen):
                return
            yield self._seen[i]

    def __iter__(self) -> Iterator[Any]:
        if self._rest is None:
            return iter(self.source)
        begun = chain(self._seen, self._rest)
        self._seen, self._rest = [], None
        return begun


class _Beginning:
    def __init__(self, begun: Begun) -> None:
        self.begun = begun

    def __iter__(self) -> Iterator[Any]:
        return self.begun._look()


def beginning_of(source: Iterable[Any]) -> Iterable[Any]:
    """What may be looked at before the first pass."""
    return source.beginning if isinstance(source, Begun) else source


def batched(data: Any, what: str) -> Any:
    """Data as batches that can be passed over several times.

    A pair (inputs, labels) of all samples, tensors or arrays, or one mapping of both, and a dataset of samples are cut into
    batches, those of a pair are views. Anything else is returned as it is.

    Raises:
        DataError: inputs and labels of a pair do not fit, or data cannot be iterated, or only once.
    """
    if isinstance(data, Dataset) and not isinstance(data, Iterable):
        return DataLoader(data, BATCH)
    if isinstance(data, str | bytes | Path):
        raise DataError(f"{what} is {type(data).__name__}; (inputs, labels), read from that file, are needed")
    # two batches would be pairs
    whole_pair = (
        isinstance(data, tuple | list)
        and len(data) == 2
        and (is_array(data[0]) or is_array(data[1]) or isinstance(data[1], Mapping))
    )
    if whole_pair or isinstance(data, Mapping):
        whole = checked(data, what)
        parts = [whole.select(slice(start, start + BATCH)) for start in range(0, len(whole), BATCH)]
        return [(part.inputs, part.labels) for part in parts]
    if isinstance(data, Iterator):
        raise DataError(
            f"{what} can be iterated only once ({type(data).__name__}); "
            "post-training passes over it several times: give a list or a DataLoader"
        )
    if not isinstance(data, Iterable):
        raise DataError(
            f"{what} is {type(data).__name__}; (inputs, labels), a dataset, or an iterable of such batches is needed"
        )
    return data
