"""Feeds: data as tasks get it, surveyed once, and found out if a later pass gives something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxinvert.errors import DataError
from fxinvert.scheduling.executor import Shared
from fxinvert.training.batch import Batch, tensors_of
from fxinvert.training.chunks import Chunk, Source
from fxinvert.training.context import Context
from fxinvert.training.data import Batches, Part
from fxinvert.training.fingerprint import Fingerprint, fold_of
from fxinvert.training.held_out import HeldOutSample


@dataclass(frozen=True)
class Sent:
    """A chunk whose items were sent."""

    index: int
    first: int
    what: str
    items: Shared[list[Any]]

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.index, self.first, self.what, self.items.get)


#: where a chunk is: a number in a source that every process can read, a chunk in this process, or one that was sent
Where = int | Chunk | Sent


@dataclass(frozen=True)
class Count:
    """What a survey tells of one chunk: its fingerprint, the samples in each part, and whether any label asks for something."""

    fingerprint: Fingerprint
    train: int
    held_out: int
    asked: bool


@dataclass
class Feed:
    """One part of some data.

    Attributes:
        name: of its source in the context.
        source: the same.
        part: which samples.
        counts: what the survey found, by chunk.
        sent: the chunks, where they had to be sent.
        ordered: whether every pass must give the same chunks, not only the same samples.
        sample: what is kept here of the samples to judge by; nothing where others are.
    """

    name: str
    source: Source
    part: Part
    counts: Sequence[Count]
    sent: Sequence[Sent] | None
    ordered: bool
    sample: HeldOutSample = field(default_factory=HeldOutSample)

    @property
    def total(self) -> Fingerprint:
        """Of all samples of the source."""
        return sum((count.fingerprint for count in self.counts), Fingerprint())

    def samples(self, index: int) -> int:
        """How many samples of this part a chunk has."""
        count = self.counts[index]
        return {"train": count.train, "held_out": count.held_out, "all": count.train + count.held_out}[
            self.part
        ]

    @property
    def size(self) -> int:
        """How many samples this part has."""
        return sum(map(self.samples, range(len(self.counts))))

    def of(self, part: Part) -> Feed:
        """The same data, another part."""
        return replace(self, part=part)

    def wheres(self) -> Iterator[Where]:
        """Where the chunks are, in order.

        Raises:
            DataError: there are more of them, or fewer, than the survey found.
        """
        if self.sent is not None:
            yield from self.sent
            return
        seen = 0
        for chunk in self.source.chunks():
            if seen == len(self.counts):
                raise DataError(f"{self._what} has more batches in a later pass than in the first")
            seen += 1
            yield chunk if self.source.local else chunk.index
        if seen < len(self.counts):
            raise DataError(
                f"{self._what} has fewer batches in a later pass than in the first, as if it could be iterated only "
                "once; a loader must give the same samples every time"
            )

    def check(self, index: int, found: Fingerprint) -> None:
        """Compares a chunk with what the survey saw.

        Raises:
            DataError: it is another.
        """
        before = self.counts[index].fingerprint
        if not self.ordered or before == found:
            return
        if before.samples != found.samples:
            problem = f"has {found.samples} samples in chunk {index} where there were {before.samples}"
        elif before.inputs == found.inputs and before.pairs != found.pairs:
            problem = "has other labels"
        else:
            problem = f"is not the same in chunk {index}: its loader shuffles (give it shuffle=False), augments, or has changed"
        raise self._differs(problem)

    def check_total(self, found: Fingerprint) -> None:
        """Compares a whole pass with what the survey saw; the order may be another.

        Raises:
            DataError: samples or labels are others. Inputs alone may be: they are where a loader augments them.
        """
        before = self.total
        if before.samples != found.samples:
            raise self._differs(f"has {found.samples} samples where there were {before.samples}")
        if before.labels != found.labels and before.inputs != found.inputs:
            raise self._differs(
                "has other samples or labels (its loader leaves out others each time, as with drop_last, draws others, as "
                "WeightedRandomSampler does, or mixes them)"
            )
        if before.labels != found.labels or (before.inputs == found.inputs and before.pairs != found.pairs):
            raise self._differs("has other labels")

    @property
    def _what(self) -> str:
        return f"{self.name}_data"

    def _differs(self, problem: str) -> DataError:
        return DataError(
            f"{self._what} {problem} in a later pass than in the first; every pass must give the same samples"
        )


class Stream:
    """The batches of some chunks, on the model's device; can be iterated as often as they can.

    Attributes:
        fingerprint: of all of their samples, whatever the part, in the last whole pass.
        asked: whether any of their labels asks for something.
        batches: those of the chunk that is read, or was last.
    """

    def __init__(self, context: Context, wheres: Iterable[Where], part: Part, name: str) -> None:
        self.context, self.wheres, self.part, self.name = context, wheres, part, name
        self.fingerprint, self.asked = Fingerprint(), False
        self.batches: Batches | None = None

    def __iter__(self) -> Iterator[Batch]:
        seen = Fingerprint()
        for where in self.wheres:
            chunk = self._chunk(where)
            device, check = self.context.device, self.context.check
            batches = self.batches = Batches(
                _Reading(chunk), device, chunk.what, self.part, chunk.first, check
            )
            yield from batches
            seen += batches.fingerprint
            self.asked = self.asked or batches.asked
        self.fingerprint = seen

    def _chunk(self, where: Where) -> Chunk:
        match where:
            case Sent():
                return where.chunk
            case int():
                return self.context.sources[self.name].chunk(where)
        return where


class _Reading:
    """A chunk's items, read anew in every pass."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk

    def __iter__(self) -> Iterator[Any]:
        return iter(self.chunk.read())


def folds_of(feed: Feed, context: Context, count: int) -> Iterator[tuple[list[Batch], list[Batch]]]:
    """For each fold of a feed's samples, held in memory, the batches without it and those of it, if neither is empty.

    A sample's fold depends on its content alone, so that copies of it are never on both sides.
    """
    batches = list(Stream(context, feed.wheres(), feed.part, feed.name))
    numbers = [fold_of(tensors_of(batch.inputs)[0], count) for batch in batches]
    for fold in range(count):
        outside, inside = (
            [own for own in map(Batch.select, batches, rows) if len(own)]
            for rows in ([number != fold for number in numbers], [number == fold for number in numbers])
        )
        if outside and inside:
            yield outside, inside


class All:
    """All chunks of a feed, anew in every pass; sent as a list of where they are."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __iter__(self) -> Iterator[Where]:
        return self.feed.wheres()
