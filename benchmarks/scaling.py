"""How closed-form statistics scale with workers, and what a plan for many machines would take.

`python -m benchmarks.scaling` prints both.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads measure the neighbours

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from rich.console import Console

import fxinvert
from benchmarks.measure import Ratio
from benchmarks.reconstruction import cifar_cnn
from fxinvert import models
from fxinvert.estimate import estimate
from fxinvert.feed import survey
from fxinvert.output_target import output_target
from fxinvert.progress import progress_display
from fxinvert.scheduling.crew import Crew
from fxinvert.scheduling.processes import ProcessExecutor
from fxinvert.training.chunks import source_of
from fxinvert.training.closed_form import sums
from fxinvert.training.context import Context
from fxinvert.workshop import Workshop

#: passes that are measured with each number of workers, in turn
PASSES = 3
#: batches per task
CHUNK = 2


def run(samples: int = 20_000, batch: int = 250) -> Iterator[Ratio]:
    """One pass of statistics of all segments of the CIFAR CNN: one worker over two."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.rand(samples, 3, 32, 32), torch.randint(0, 10, (samples,))
    with ExitStack() as stack:
        passes = {workers: _pass(stack, workers, models.batches(x, y, batch)) for workers in (1, 2)}
        times: dict[int, list[float]] = {1: [], 2: []}
        for repetition in range(PASSES + 1):
            for workers, work in passes.items():
                began = time.perf_counter()
                work()
                if repetition:  # the first warms up
                    times[workers].append(time.perf_counter() - began)
    one, two = (statistics.median(times[workers]) for workers in (1, 2))
    yield Ratio(
        f"cifar_cnn: statistics of {samples:,} images, 1 worker",
        "2 workers",
        one / two,
        None,
        "aim: at least 1.6",
    )


def _pass(stack: ExitStack, workers: int, batches: models.data.Batches):  # type: ignore[no-untyped-def, name-defined]
    """A function that does one pass with so many workers."""
    executor = ProcessExecutor(workers)
    executor.open(1, None)
    stack.callback(executor.close)
    context = Context(cifar_cnn(), {"train": source_of(batches, size=CHUNK)})
    display = stack.enter_context(progress_display(1, False))
    feed = survey("train", context, executor, False, None)
    target = output_target("cross_entropy")
    shop = Workshop(Crew(executor), executor.share(context), {"train": feed}, target, display)
    paths = [path for segment in fxinvert.partition(context.graph).segments for path in segment.trained]
    arguments = {"output_target": target, "paths": paths, "satisfied_weight": 0.1, "weighted": False}

    def work() -> None:
        for block in shop.blocks(sums, arguments, None):
            for _ in block:
                pass

    return work


def main() -> None:
    """Measures, and simulates."""
    console = Console()
    for ratio in run():
        console.print(f"{ratio.what} / {ratio.compared_with}: {ratio.ratio:.2f} ({ratio.note})")
    torch.manual_seed(0)
    model, example = cifar_cnn(), (torch.rand(8, 3, 32, 32),)
    plan = fxinvert.partition(fxinvert.trace(model, example))
    costs = estimate(model, example, plan, samples=10_000_000, batch=250, chunk=8, schedule="parallel")
    console.print(costs.tasks())
    console.print(costs.scaling((1, 10, 100, 1000, 5000)))


if __name__ == "__main__":
    main()
