"""How closed-form statistics scale with workers: measured with two, simulated for many.

Wall times need two cores that nobody else uses. Processor seconds do not: they count what workers and the main process
had to do, so that they tell what two free cores would make of it; and the speed-up of plain matrix products, measured
in turn, tells what the machine gives to two processes at the moment.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

import fxinvert
from benchmarks.measure import Ratio
from benchmarks.studies.networks import cifar_cnn
from fxinvert import models
from fxinvert.estimates import Estimate
from fxinvert.estimating import estimate
from fxinvert.output_target import output_target
from fxinvert.progress import progress_display
from fxinvert.scheduling.crew import Crew
from fxinvert.scheduling.processes import ProcessExecutor
from fxinvert.survey import survey
from fxinvert.training.batch import Batch
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context
from fxinvert.training.op_sums import sums
from fxinvert.workshop import Workshop

#: batches per task
CHUNK = 2
#: cores that one and two workers share with the main process, and what two are to bring over one
CORES, AIM = 2, 1.6
#: matrix products that show what the machine gives
PRODUCTS, SIDE = 150, 512
#: chunks that every worker begins with
WARM = 4


@dataclass(frozen=True)
class Pass:
    """What one pass over the data took, in seconds.

    Attributes:
        wall: until its end.
        workers: of the processor, by each worker.
        main: of the processor, by the process that adds up.
        plain: until the end of the matrix products.
    """

    wall: float
    workers: tuple[float, ...]
    main: float
    plain: float

    @property
    def free(self) -> float:
        """How long it takes at least on free cores: nobody is done sooner than the busiest, nor all than their share."""
        return max(*self.workers, (sum(self.workers) + self.main) / CORES)


def run(samples: int = 20_000, batch: int = 250, rounds: int = 3) -> Iterator[Ratio]:
    """Passes of statistics of all segments of the CIFAR CNN, with one worker and with two in turn; with many, simulated."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.rand(samples, 3, 32, 32), torch.randint(0, 10, (samples,))
    with ExitStack() as stack:
        crews = {workers: Passes(stack, workers, models.batches(x, y, batch), batch) for workers in (1, 2)}
        passes = [{workers: crew() for workers, crew in crews.items()} for _ in range(rounds)]
    alone, both = ([each[workers] for each in passes] for workers in (1, 2))
    what, than = f"cifar_cnn: statistics of {samples:,} images, 2 workers", "1 worker"

    def compared(name: str, figure: Callable[[Pass], float], note: str = "") -> Ratio:
        found = statistics.median(figure(two) / figure(one) for one, two in zip(alone, both, strict=True))
        best = min(map(figure, both)) / min(map(figure, alone))
        return Ratio(
            f"{what}, {name}",
            than,
            found,
            1 / AIM,
            f"speed-up {1 / found:.2f}, of the best {1 / best:.2f}{note}",
        )

    chunks = samples // (batch * CHUNK)
    yield compared("wall time", lambda p: p.wall, f"; {statistics.median(p.wall for p in alone):.1f} s alone")
    yield compared("processor seconds", lambda p: p.free, "; on cores that nobody else uses")
    yield compared("wall time of plain products", lambda p: p.plain, "; what the machine gives at the moment")
    yield Ratio(
        "what the main process does per chunk",
        "what workers do",
        statistics.median(p.main / sum(p.workers) for p in both),
        None,
        f"{1e3 * statistics.median(p.main for p in both) / chunks:.1f} ms of the processor per chunk of {batch * CHUNK}",
    )
    yield from many_workers()


def many_workers() -> Iterator[Ratio]:
    """A sweep with many workers, simulated."""
    costs = simulated()
    for workers in (256, 1_000, 5_000):
        yield Ratio(
            f"cifar_cnn: sweep over {costs.samples:,} images, {workers:,} workers, simulated",
            "1 worker",
            costs.seconds(workers) / costs.seconds(1),
            None,
            f"speed-up {costs.seconds(1) / costs.seconds(workers):,.0f}; {costs.seconds(1):,.0f} s alone",
        )


def simulated() -> Estimate:
    """What a sweep over ten million images takes, from times measured here."""
    torch.manual_seed(0)
    model, example = cifar_cnn(), (torch.rand(8, 3, 32, 32),)
    plan = fxinvert.partition(fxinvert.trace(model, example))
    return estimate(model, example, plan, samples=10_000_000, batch=250, chunk=8, schedule="parallel")


class Passes:
    """Passes with so many workers, which are warm after the first chunks.

    Args:
        stack: ends the workers.
        workers: how many.
        batches: the data.
        batch: samples in each.
    """

    def __init__(self, stack: ExitStack, workers: int, batches: models.data.Batches, batch: int) -> None:
        self.workers, self.executor = workers, ProcessExecutor(workers)
        self.executor.open(1, None)
        stack.callback(self.executor.close)
        context = Context(cifar_cnn(), {"train": source_of(batches, size=CHUNK)})
        display = stack.enter_context(progress_display(1, False))
        feed = survey("train", context, self.executor, False, None, lambda *_: iter(()))
        self.target = output_target("cross_entropy")
        self.shop = Workshop(
            Crew(self.executor),
            self.executor.share(context),
            {"train": feed, "held_out": feed},
            self.target,
            display,
        )
        self.paths = [path for part in fxinvert.partition(context.graph).segments for path in part.trained]
        #: processor seconds that each process has used up
        self.used: dict[int, float] = {}
        self._statistics(every=workers * WARM * CHUNK * batch)

    def __call__(self) -> Pass:
        before, main, began = dict(self.used), time.process_time(), time.perf_counter()
        self._statistics()
        wall, main = time.perf_counter() - began, time.process_time() - main
        began = time.perf_counter()
        list(self.executor.run(products, range(4)))
        plain = time.perf_counter() - began
        spent = tuple(seconds - before.get(worker, 0.0) for worker, seconds in self.used.items())
        return Pass(wall, spent, main, plain)

    def _statistics(self, every: int | None = None) -> None:
        """A pass; or the first chunks of one, for every worker to begin with."""
        arguments = {
            "output_targets": [self.target],
            "paths": self.paths,
            "satisfied_weight": 0.1,
            "weighted": False,
        }
        for block in self.shop.blocks(timed_sums, arguments, every):
            for _, worker, seconds in block:
                self.used[worker] = seconds
            if every is not None:
                return


def timed_sums(context: Context, batches: Iterable[Batch], **arguments: Any) -> tuple[Any, int, float]:
    """The statistics, who found them, and the processor seconds that it has used up since it began."""
    return sums(context, batches, **arguments), os.getpid(), time.process_time()


def products(_: int) -> float:
    """Products of matrices."""
    a = torch.rand(SIDE, SIDE)
    return sum(float((a @ a)[0, 0]) for _ in range(PRODUCTS))
