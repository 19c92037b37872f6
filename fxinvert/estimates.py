"""Estimates: what a sweep will cost, task by task, before any work; and how long it takes with more workers.

Jobs are measured on a few samples, with the one thread that a task has by default (`fxinvert.training.costs`). Passes
over the data are shared out by chunks; what is not shared is what one process does with what comes back: it adds
statistics up in the order of the chunks, solves, and searches steps on a sample of the held-out data.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from fxinvert.notebook import plain
from fxinvert.notebook import table as html_table
from fxinvert.training.costs import Cost, Stage
from fxinvert.training.fingerprint import HELD_OUT
from fxinvert.training.held_out import KEPT
from fxinvert.training.judge import Share

#: bytes per second between machines that estimates assume: ten gigabit Ethernet
BANDWIDTH = 1.25e9
#: bytes of what is told about a candidate
TALLY = 32
#: numbers of workers that times are told for
WORKERS = (1, 2, 4, 8, 16, 64, 256, 1000)

_HEADER = ("#", "task", "after", "how many", "mult-adds each", "memory", "sent back", "seconds each")


@dataclass(frozen=True)
class Wave:
    """The training of some segments from one snapshot.

    Attributes:
        segments: their names.
        stages: of the work; None: the method does not tell.
        judged: what a candidate costs per sample, once what comes before the segments is known.
    """

    segments: tuple[str, ...]
    stages: tuple[Stage, ...] | None
    judged: Cost


@dataclass(frozen=True)
class Row:
    """Tasks of one kind.

    Attributes:
        number: of the row.
        task: what each does.
        after: the rows whose tasks have to be done before.
        count: how many there are.
        times: how often that is repeated with what follows, at most.
        operations: multiply-adds of each.
        memory, sent: bytes that each works with and gives back.
        seconds: of each.
    """

    number: int
    task: str
    after: tuple[int, ...]
    count: int
    times: int
    operations: float
    memory: float
    sent: float
    seconds: float


@dataclass(frozen=True, repr=False)
class Estimate:
    """What a sweep costs; `print(estimate)` shows it.

    Attributes:
        method: its name.
        waves: in order.
        forward: what a forward pass costs per sample.
        state: bytes of the parameters and buffers, which every worker is sent with every stage.
        samples: in all; a fifth of them is held out.
        chunk, batch: samples per chunk, and per batch, which is in memory.
        measured: how many samples jobs were measured with, at most.
        share: how updates share the correction.
    """

    method: str
    waves: tuple[Wave, ...]
    forward: Cost
    state: int
    samples: int
    chunk: int
    batch: int
    measured: int
    share: Share = "searched"

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return math.ceil(self.samples / self.chunk)

    @property
    def is_known(self) -> bool:
        """Whether the method tells what it costs."""
        return all(wave.stages is not None for wave in self.waves)

    @property
    def operations(self) -> float:
        """Multiply-adds of all tasks."""
        return sum(row.operations * row.count * row.times for row in self.rows())

    def seconds(self, workers: int, bandwidth: float = BANDWIDTH) -> float:
        """How long a sweep takes, at most; NaN if the method does not tell.

        Args:
            workers: at work.
            bandwidth: bytes per second that one process can receive or send.
        """
        if not self.is_known:
            return math.nan
        here = 0.0 if workers == 1 else 1.0 / bandwidth
        return sum(self._stage_seconds(wave, stage, workers, here) for wave, stage in self._stages())

    def _stages(self) -> Iterator[tuple[Wave, Stage]]:
        return ((wave, stage) for wave in self.waves for stage in wave.stages or ())

    def _stage_seconds(self, wave: Wave, stage: Stage, workers: int, here: float) -> float:
        each = [stage.samples * stage.passes * cost.seconds for _, cost in stage.tasks]
        count = self._chunks_of(stage) if stage.by_chunk else len(each)
        if stage.by_chunk:
            each = [each[0] / count] * count
        reducing = count * (stage.add_seconds + stage.sent * here)
        # sums are added up while others are made; what is made last can only be added afterwards
        work = max(_makespan(each, workers), reducing) + stage.solve_seconds
        chunks = min(workers, self.chunks)
        measuring = math.ceil(self.chunks / chunks) * self.chunk / HELD_OUT * self.forward.seconds
        judging = self._search(wave, stage).seconds + (measuring if self._is_sampled else 0.0)
        return stage.times * (min(workers, count) * self.state * here + work + judging)

    def _chunks_of(self, stage: Stage) -> int:
        return max(math.ceil(stage.samples / (self.chunk * (1 - 1 / HELD_OUT))), 1)

    @property
    def _is_sampled(self) -> bool:
        return self.samples / HELD_OUT > KEPT

    def _candidates(self, stage: Stage) -> int:
        """Each alternative, half of the best and its best multiple, and the quadratic model's."""
        sizes = stage.updates + 1 if stage.updates > 1 and self.share == "searched" else 0
        return stage.proposals + 2 + sizes

    def _search(self, wave: Wave, stage: Stage) -> Cost:
        """What candidates cost that are measured here, on samples that are kept; what they have in common counts once."""
        kept, tried = min(self.samples / HELD_OUT, KEPT), self._candidates(stage) - 1
        judged = stage.judged or wave.judged
        return Cost(
            kept * (self.forward.operations + tried * judged.operations),
            kept * (self.forward.seconds + tried * judged.seconds),
        )

    def rows(self) -> Iterator[Row]:
        """The tasks of a sweep, in their order; those of one stage can be done at the same time."""
        number, before = 0, tuple[int, ...]()

        def row(task: str, count: int, cost: Cost, samples: float, stage: Stage, **more: float) -> Row:
            nonlocal number
            number += 1
            given = {"memory": 0.0, "sent": 0.0, "seconds": samples * cost.seconds, **more}
            return Row(number, task, before, count, stage.times, samples * cost.operations, **given)

        for wave, stage in self._stages():
            begun, count = number, self._chunks_of(stage) if stage.by_chunk else 1
            for task, cost in stage.tasks:
                samples = stage.passes * stage.samples / count
                yield row(task, count, cost, samples, stage, memory=stage.memory, sent=stage.sent)
            before = tuple(range(begun + 1, number + 1))
            if stage.solve_seconds:
                spent = count * stage.add_seconds + stage.solve_seconds
                cost = Cost(stage.solve_operations, spent)
                yield row("  add up and solve", 1, cost, 1, stage, memory=4 * stage.sent)
                before = (number,)
            tried = self._candidates(stage)
            yield row(f"  judge {tried} candidates", 1, self._search(wave, stage), 1, stage)
            before = (number,)
            if self._is_sampled:
                held_out = self.samples / HELD_OUT / self.chunks
                yield row("  measure the best", self.chunks, self.forward, held_out, stage, sent=TALLY)
                before = (number,)

    def to_dict(self, workers: Sequence[int] = WORKERS) -> dict[str, Any]:
        """JSON-ready; `seconds` by the number of workers; no tasks and seconds if the method does not tell."""
        shown = ("method", "state", "samples", "chunk", "batch", "measured")
        return {name: getattr(self, name) for name in shown} | {
            "chunks": self.chunks,
            "waves": [list(wave.segments) for wave in self.waves],
            "tasks": [asdict(row) for row in self.rows()],
            "seconds": {str(n): self.seconds(n) for n in workers} if self.is_known else {},
        }

    def tasks(self) -> Table:
        """The tasks of a sweep."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in _HEADER:
            table.add_column(header, justify="left" if header == "task" else "right")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def scaling(self, workers: Sequence[int] = WORKERS) -> Table:
        """How long a sweep takes with more workers."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in ("workers", "seconds per sweep", "speed-up", "efficiency"):
            table.add_column(header, justify="right")
        alone = self.seconds(1)
        for count in workers:
            speedup = alone / self.seconds(count)
            table.add_row(
                f"{count:,}", f"{self.seconds(count):.3g}", f"{speedup:.1f}", f"{speedup / count:.0%}"
            )
        return table

    def __rich__(self) -> Group:
        return Group(self._title(), self.tasks(), self.scaling()) if self.is_known else Group(self._title())

    def __repr__(self) -> str:
        return plain(self)

    def _repr_html_(self) -> str:
        times = ", ".join(f"{self.seconds(count):.3g} s with {count:,}" for count in WORKERS)
        notes = [f"By the number of workers: {times}."] if self.is_known else []
        return html_table(self._title(), _HEADER, self._cells(), notes)

    def _title(self) -> str:
        names = ", ".join(name for wave in self.waves for name in wave.segments)
        what = f"One sweep of {names} by method {self.method!r} over {self.samples:,} samples in {self.chunks:,} chunks"
        if self.is_known:
            return f"{what}, at most, as measured here on {self.measured}"
        return f"{what} is not estimated: the method has no `stages` that tell what it costs"

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows():
            yield (
                f"{row.number}",
                row.task,
                "–".join(f"{number}" for number in sorted({*row.after[:1], *row.after[-1:]})),
                f"{row.count:,}" if row.times == 1 else f"{row.count:,} × {row.times:,}",
                f"{row.operations:.1e}" if row.operations else "",
                _bytes(row.memory),
                _bytes(row.sent),
                f"{row.seconds:.3g}",
            )


def _makespan(each: Sequence[float], workers: int) -> float:
    """When the last of some tasks is done, if every worker takes the next one as soon as it is free."""
    free = [0.0] * min(workers, len(each))
    for seconds in each:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def _bytes(count: float) -> str:
    if not count:
        return ""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
