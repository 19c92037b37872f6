"""The workshop: jobs of training, done as tasks by a crew, on data that is the same in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any

from fxinvert.errors import DataError
from fxinvert.feed import All, Feed, Stream, Where, folds_of
from fxinvert.output_target import OutputTarget
from fxinvert.progress import Display
from fxinvert.scheduling.crew import Crew, Task
from fxinvert.scheduling.executor import Shared
from fxinvert.scheduling.keys import content_key
from fxinvert.scheduling.store import Damaged
from fxinvert.survey import survey_here
from fxinvert.training.batch import Batch
from fxinvert.training.chunks import source_of
from fxinvert.training.confirm import Gain, gain
from fxinvert.training.context import Context, Digests, State
from fxinvert.training.data import Part
from fxinvert.training.fingerprint import Fingerprint
from fxinvert.training.judge import Candidate, tallies
from fxinvert.training.metrics import Metrics, Tally
from fxinvert.training.outputs import Remembered
from fxinvert.training.sizes import Quadratic, quadratic
from fxinvert.training.work import Job, Proposal


class Workshop:
    """Where the jobs of one run are done.

    Args:
        crew: by whom.
        context: this process's own.
        feeds: the data to train on ("train") and to judge by ("held_out").
        output_target: what the output should have been.
        display: is told how far things are.
    """

    def __init__(
        self,
        crew: Crew,
        context: Shared[Context],
        feeds: Mapping[str, Feed],
        output_target: OutputTarget,
        display: Display,
    ) -> None:
        self.crew, self.context, self.feeds = crew, context.get(), feeds
        self.output_target, self.display = output_target, display
        self.output_targets: Sequence[OutputTarget] = [output_target]
        self.gained, self.sweep = 0.0, 0
        self.taken: int | None = None
        self.begun: State = {}
        self._shared, self._what, self._digest = context, "", ""
        self._state: Shared[State] | None = None
        self._digests = Digests()
        self._once: dict[Any, tuple[Any, Any]] = {}
        self._sample, self._outputs_over = feeds["held_out"].sample.batches(), Remembered()
        self.use({})

    def begin(self, text: str) -> None:
        self._what = text

    def state(self) -> State:
        return self.context.state()

    def use(self, state: Mapping[str, Any]) -> None:
        if self._digest and self.context.loaded == self._digest and self.context.holds(state):
            return
        self.context.load(state)
        now = self.context.state()
        digest = self._digests.of(now)
        if digest != self._digest:
            if self._state is not None:
                self.crew.executor.forget(self._state)
            self._state, self._digest = self.crew.executor.share(now), digest
        self.context.load({}, digest)

    @property
    def samples(self) -> int:
        return self.feeds["train"].size

    @property
    def sampled(self) -> bool:
        return not self.feeds["held_out"].sample.is_whole

    def search(self, proposals: Sequence[Proposal], candidates: Sequence[Candidate]) -> list[Metrics]:
        if not self._sample:  # too few samples to keep some aside
            return self.measure(proposals, candidates)
        found = tallies(
            self.context,
            self._sample,
            proposals=proposals,
            candidates=candidates,
            outputs_over=self._outputs_over,
        )
        return [total.metrics for total in found]

    def measure(self, proposals: Sequence[Proposal], candidates: Sequence[Candidate]) -> list[Metrics]:
        if self._sample and not self.sampled:
            return self.search(proposals, candidates)
        arguments = {"proposals": proposals, "candidates": candidates}
        totals = [Tally() for _ in candidates]
        feed = self.feeds["held_out"]
        for part in self._over(feed, feed.wheres(), tallies, arguments, "measure"):
            totals = [total + own for total, own in zip(totals, part, strict=True)]
        return [total.metrics for total in totals]

    def quadratic(self, proposal: Proposal) -> Quadratic:
        total: Quadratic = reduce(
            Quadratic.__add__, self._held_out(quadratic, {"proposal": proposal}, "sizes")
        )
        return total

    def gain(self, state: State) -> Gain:
        return sum(self._held_out(gain, {"state": state}, "gain"), Gain())

    def folds(self, count: int) -> Iterator[tuple[Workshop, list[Batch]]]:
        begun, ordered = self.state(), self.crew.store is not None
        for number, (outside, inside) in enumerate(folds_of(self.feeds["train"], self.context, count), 1):
            name = f"train without fold {number}"
            source = source_of([tuple(batch) for batch in outside], name)
            feed = survey_here(name, source, self.context, self.crew.executor, ordered, None)
            self.use(begun)
            feeds = {**self.feeds, "train": feed}
            yield Workshop(self.crew, self._shared, feeds, self.output_target, self.display), inside

    def blocks(self, job: Job, arguments: Mapping[str, Any], every: int | None) -> Iterator[Iterator[Any]]:
        feed = self.feeds["train"]
        wheres, index = feed.wheres(), 0
        while index < len(feed.counts):
            start, samples = index, 0
            while index < len(feed.counts) and (every is None or samples < every):
                samples += feed.samples(index)
                index += 1
            yield self._over(feed, _first(wheres, index - start), job, arguments, "sums", start)
        for _ in wheres:  # tells of chunks too many
            pass

    def each(self, job: Job, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        feed = self.feeds["train"]
        wheres: Iterable[Where] = list(feed.wheres()) if self.crew.executor.remote else All(feed)
        tasks = (
            self._task(i, f"train {i + 1}", feed, wheres, feed.total, job, given)
            for i, given in enumerate(arguments)
        )
        self.display.begin(f"{self._what}: train", len(arguments))
        found = []
        for result, seen in self.crew.run(tasks, self.display.done):
            if seen.samples:
                feed.check_total(seen)
            found.append(result)
        return found

    def once(self, about: Any, do: Callable[[], Any]) -> Any:
        if len(self.output_targets) == 1:  # nothing will be asked for again
            self._once.clear()
            return do()
        state = self._digest, self.output_targets
        if about not in self._once or self._once[about][0] != state:
            self._once[about] = state, do()
        return self._once[about][1]

    def remembered(self, about: Any, do: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        store = self.crew.store
        if store is None:
            yield from do()
            return
        key = content_key(about, self._digest, *(str(feed.total) for feed in self.feeds.values()))
        try:
            found, result = store.get(key)
        except Damaged as error:
            self.crew.note("damaged", task="wave", key=key, file=str(error))
            found = False
        if found:
            yield from result
            return
        self.crew.used.clear()
        result = []
        for each in do():
            result.append(each)
            yield each
        store.put(key, result)
        store.remove(self.crew.used)  # what they told is in the result
        self.crew.note("wave", what=self._what, key=key)

    def _held_out(self, job: Job, arguments: Mapping[str, Any], name: str) -> Iterator[Any]:
        """The results of a job with the sample that is kept, or, if there is none, with every chunk of held-out data."""
        if self._sample:
            yield job(self.context, self._sample, **arguments, outputs_over=self._outputs_over)
        else:
            feed = self.feeds["held_out"]
            yield from self._over(feed, feed.wheres(), job, arguments, name)

    def _over(
        self,
        feed: Feed,
        wheres: Iterable[Where],
        job: Job,
        arguments: Mapping[str, Any],
        name: str,
        start: int = 0,
    ) -> Iterator[Any]:
        """The results of a job with each of some chunks, checked against the survey."""
        given = self.crew.executor.share(arguments)
        key = content_key(arguments) if self.crew.store is not None else ""
        tasks = (
            self._task(
                i, f"{name} {start + i}", feed, [where], feed.counts[start + i].fingerprint, job, given, key
            )
            for i, where in enumerate(wheres)
        )
        self.display.begin(f"{self._what}: {name}", len(feed.counts))
        seen, i = Fingerprint(), -1
        for i, (result, found) in enumerate(self.crew.run(tasks, self.display.done)):
            feed.check(start + i, found)
            seen += found
            yield result
        self.crew.executor.forget(given)
        if i + 1 == len(feed.counts):  # a whole pass
            feed.check_total(seen)

    def _task(
        self,
        index: int,
        name: str,
        feed: Feed,
        wheres: Iterable[Where],
        data: Fingerprint,
        job: Job,
        arguments: Shared[Mapping[str, Any]] | Mapping[str, Any],
        arguments_key: str = "",
    ) -> Task:
        key = ""
        if self.crew.store is not None:
            told = arguments_key or content_key(arguments)
            key = content_key(job, told, self._digest, str(data), feed.part)
        assert self._state is not None, "no state was set"
        given = (self._shared, self._state, self._digest, job, arguments, wheres, feed.part, feed.name)
        return Task(index, f"{self._what}: {name}", do_job, given, key)


def do_job(
    context: Shared[Context],
    state: Shared[State],
    digest: str,
    job: Job,
    arguments: Shared[Mapping[str, Any]] | Mapping[str, Any],
    wheres: Iterable[Where],
    part: Part,
    name: str,
) -> tuple[Any, Fingerprint]:
    """Does a job, in any process; with the fingerprint of the data that it saw."""
    own = context.get()
    own.load(state.get(), digest)
    batches = Stream(own, wheres, part, name)
    try:
        result = job(own, batches, **(arguments if isinstance(arguments, Mapping) else arguments.get()))
    except DataError as error:
        at = batches.batches.at if batches.batches else ""
        if type(error) is not DataError or not at or at in str(error):
            raise
        raise DataError(f"{at}: {error}") from error
    return result, batches.fingerprint


def _first(items: Iterator[Where], number: int) -> Iterator[Where]:
    """The next items, not one more is taken."""
    return chain.from_iterable([next(items)] for _ in range(number))
