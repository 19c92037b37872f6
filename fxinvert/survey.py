"""Surveys: the first pass over some data, which counts it, marks it, and keeps a sample to judge by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.feed import Count, Feed, Sent, Stream
from fxinvert.labels import IGNORED
from fxinvert.scheduling.executor import Executor, Shared
from fxinvert.training.chunks import Chunk, Source
from fxinvert.training.context import Context
from fxinvert.training.data import Part, no_batches
from fxinvert.training.fingerprint import HELD_OUT
from fxinvert.training.held_out import HeldOutSample, bound

#: calls a function, with the context and each of some arguments, anywhere; the results in the order of the arguments
Ask = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]


def survey(
    name: str, context: Context, executor: Executor, ordered: bool, judged: Part | None, ask: Ask
) -> Feed:
    """Passes over some data once: counts, fingerprints, chunks sent to where they will be needed, a sample to judge by.

    Args:
        name: of a source of the context.
        context: with the source.
        executor: who will work on it.
        ordered: whether later passes must give the same chunks.
        judged: the part that steps are judged by, of which a sample is kept; None: other data are.
        ask: has chunks looked at that every process can read.

    Raises:
        DataError: there are no batches, one is not what it should be, or no label asks for anything.
    """
    feed = _survey(name, context, executor, ordered, judged, ask)
    if not any(count.asked for count in feed.counts):
        raise DataError(f"{name}_data: all labels are {IGNORED}, which asks for nothing")
    if judged and feed.sample.seen and not feed.sample.asked:
        raise DataError(
            f"{name}_data: all labels of the samples that steps are judged by are {IGNORED}, which asks for nothing; "
            "give validation_data whose labels ask for something"
        )
    return feed


def _survey(
    name: str, context: Context, executor: Executor, ordered: bool, judged: Part | None, ask: Ask
) -> Feed:
    source = context.sources[name]
    if source.local:
        return survey_here(name, source, context, executor, ordered, judged)
    sample = _sample(judged)
    indices = [chunk.index for chunk in source.chunks()]
    found: list[Counted] = list(ask(count_chunk, [(name, index, judged) for index in indices]))
    if not found:
        raise no_batches(f"{name}_data")
    _gather(name, found, judged, sample, ask)
    return Feed(name, source, "all", [own.count for own in found], None, True, sample)


def parts_of(surveyed: dict[str, Feed]) -> tuple[dict[str, Feed], list[str]]:
    """What is trained on and what is judged on, and what to note about them."""
    data = surveyed["train"]
    if "validation" in surveyed:
        return {"train": data, "held_out": surveyed["validation"]}, []
    if all(any(getattr(count, part) for count in data.counts) for part in ("train", "held_out")):
        return {"train": data.of("train"), "held_out": data.of("held_out")}, []
    note = "too few samples to keep some aside: steps were judged on the training data"
    return {"train": data, "held_out": replace(data, sample=HeldOutSample())}, [note]


def survey_here(
    name: str, source: Source, context: Context, executor: Executor, ordered: bool, judged: Part | None
) -> Feed:
    """`survey`, of data that only this process can read.

    Raises:
        DataError: as there.
    """
    sample, counts, sent = _sample(judged), list[Count](), list[Sent]()
    for chunk in source.chunks():
        counts.append(count(context, chunk, judged, sample))
        if executor.remote:
            items = executor.share(list(chunk.read()))
            sent.append(Sent(chunk.index, chunk.first, chunk.what, items))
    if not counts:
        raise no_batches(f"{name}_data")
    return Feed(name, source, "all", counts, sent if executor.remote else None, ordered, sample)


def count(context: Context, chunk: Chunk, judged: Part | None, sample: HeldOutSample) -> Count:
    """What a survey tells of a chunk.

    Args:
        context: the model.
        chunk: the data.
        judged: the part that steps are judged by; None: other data are.
        sample: is given the samples of that part.
    """
    batches = Stream(context, [chunk], judged or "held_out", "")
    held_out = 0
    for batch in batches:
        held_out += len(batch)
        if judged:
            sample.add(batch)
    return Count(batches.fingerprint, batches.fingerprint.samples - held_out, held_out, batches.asked)


@dataclass(frozen=True)
class Counted:
    """What a survey tells of a chunk that was read elsewhere.

    Attributes:
        count: of its samples.
        hashes: of its samples to judge by, if they are not too many to be kept.
        largest: how many of these are in a batch, at most.
    """

    count: Count
    hashes: Tensor
    largest: int


def count_chunk(context: Shared[Context], name: str, index: int, judged: Part | None) -> Counted:
    """What a survey tells of a chunk that every process can read."""
    own, sample = context.get(), _sample(judged)
    found = count(own, own.sources[name].chunk(index), judged, sample)
    return Counted(found, sample.hashes, sample.largest)


def sample_of_chunk(
    context: Shared[Context], name: str, index: int, judged: Part, most: int
) -> HeldOutSample:
    """The samples of a chunk to judge by, with hashes up to a bound."""
    own, sample = context.get(), _sample(judged)
    count(own, own.sources[name].chunk(index), judged, sample)
    sample.limit(most)
    return sample


def _gather(name: str, found: list[Counted], judged: Part | None, sample: HeldOutSample, ask: Ask) -> None:
    """Fills a sample with what would be in it if all had been read here; no more of the data is sent."""
    most = bound(torch.cat([sample.hashes, *(own.hashes for own in found)]))
    chosen = [i for i, own in enumerate(found) if (own.hashes <= most).any()]
    for part in ask(sample_of_chunk, [(name, i, judged, most) for i in chosen]):
        sample.join(part)
    sample.seen = sum(own.count.held_out for own in found)
    sample.largest = max((own.largest for own in found), default=0)


def _sample(judged: Part | None) -> HeldOutSample:
    return HeldOutSample(HELD_OUT if judged == "held_out" else 1)
