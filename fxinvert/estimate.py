"""Estimates: what a sweep will cost, task by task, before any work; and how long it takes with more workers.

Times are those of a few samples, measured here with the one thread that a task has by default. A sweep's data passes are shared out by
chunks; what is not shared is what one process does with what comes back: it adds the statistics up in the order of the
chunks, and solves.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from fxinvert.output_target import OutputTarget
from fxinvert.passes.plan import Plan, Segment
from fxinvert.scheduling import waves
from fxinvert.scheduling.executor import torch_threads
from fxinvert.training.batch import Batch, tensors_of
from fxinvert.training.blocks import added
from fxinvert.training.chunks import source_of
from fxinvert.training.closed_form import DAMPINGS, Sums, sums
from fxinvert.training.context import Context
from fxinvert.training.fingerprint import HELD_OUT

#: candidates that an update is judged by: with each damping, half of it, and the best multiple
JUDGED = len(DAMPINGS) + 2
#: samples that times are measured with
PROBE = 32
#: bytes per second between machines that estimates assume: ten gigabit Ethernet
BANDWIDTH = 1.25e9


#: numbers of workers that times are told for
WORKERS = (1, 2, 4, 8, 16, 64, 256, 1000)


@dataclass(frozen=True)
class Wave:
    """The closed-form training of some segments from one snapshot.

    Attributes:
        segments: their names.
        operations: multiply-adds per sample: a forward pass, its inverse, and the Gram matrices.
        sample_seconds: of statistics, per sample.
        forward_seconds: of a forward pass, per sample.
        statistics: bytes of one chunk's statistics.
        add_seconds, solve_seconds: of adding one chunk's statistics to a sum, and of all solutions.
        working: bytes of the values of one sample, forwards and backwards.
    """

    segments: tuple[str, ...]
    operations: int
    sample_seconds: float
    forward_seconds: float
    statistics: int
    add_seconds: float
    solve_seconds: float
    working: int


@dataclass(frozen=True)
class Estimate:
    """What a sweep costs.

    Attributes:
        waves: in order.
        state: bytes of the parameters and buffers, which every worker is sent once per wave.
        samples: in all; a fifth of them is held out.
        chunk, batch: samples per chunk, which is a task, and per batch, which is in memory.
    """

    waves: tuple[Wave, ...]
    state: int
    samples: int
    chunk: int
    batch: int

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return math.ceil(self.samples / self.chunk)

    def seconds(self, workers: int, bandwidth: float = BANDWIDTH) -> float:
        """How long a sweep takes.

        Args:
            workers: at work.
            bandwidth: bytes per second that one process can receive or send.
        """
        rounds = math.ceil(self.chunks / workers)
        total = 0.0
        for wave in self.waves:
            here = 0.0 if workers == 1 else 1.0 / bandwidth
            working = rounds * self.chunk * wave.sample_seconds * (1 - 1 / HELD_OUT)
            reducing = self.chunks * (wave.add_seconds + wave.statistics * here)
            judging = rounds * self.chunk / HELD_OUT * wave.forward_seconds * JUDGED
            sending = min(workers, self.chunks) * self.state * here
            # sums are added up while others are made; what is made last can only be added afterwards
            total += sending + max(working, reducing) + wave.solve_seconds + judging
        return total

    def to_dict(self, workers: Sequence[int] = WORKERS) -> dict[str, Any]:
        """JSON-ready; `seconds` by the number of workers."""
        seconds = {str(count): self.seconds(count) for count in workers}
        return asdict(self) | {"chunks": self.chunks, "seconds": seconds}

    def tasks(self) -> Table:
        """The tasks of a sweep."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in (">#", "task", ">after", ">how many", ">mult-adds each", ">memory", ">sent back", ">seconds each"):  # fmt: skip
            table.add_column(header.removeprefix(">"), justify="right" if header.startswith(">") else "left")
        for i, wave in enumerate(self.waves):
            samples, first = self.chunk * (1 - 1 / HELD_OUT), 3 * i + 1
            table.add_row(
                f"{first}",
                f"statistics of {', '.join(wave.segments)}",
                f"{first - 1}" if i else "",
                f"{self.chunks:,}",
                f"{wave.operations * samples:.1e}",
                _bytes(self.batch * wave.working + 2 * wave.statistics),
                _bytes(wave.statistics),
                f"{samples * wave.sample_seconds:.3g}",
            )
            table.add_row(f"{first + 1}", "  add up and solve", f"{first}", "1", "", _bytes(4 * wave.statistics), "",
                          f"{self.chunks * wave.add_seconds + wave.solve_seconds:.3g}")  # fmt: skip
            table.add_row(f"{first + 2}", f"  judge {JUDGED} candidates", f"{first + 1}", f"{self.chunks:,}", "", "", _bytes(32 * JUDGED),
                          f"{self.chunk / HELD_OUT * wave.forward_seconds * JUDGED:.3g}")  # fmt: skip
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


def estimate(
    model: nn.Module,
    example: tuple[Any, ...],
    plan: Plan,
    *,
    samples: int,
    batch: int,
    chunk: int,
    schedule: str = "sequential",
    output: Any = None,
) -> Estimate:
    """Measures what a closed-form sweep costs, on copies of a few samples.

    Args:
        model: the model, which stays as it is.
        example: inputs of a few samples.
        plan: the segments.
        samples: how many there will be.
        batch, chunk: samples per batch, and batches per chunk.
        schedule: how segments are grouped; "single" is not one that can be estimated without a segment.
        output: which output is supervised, if there are several.
    """
    few = Batch(example, torch.zeros(len(tensors_of(example)[0])))
    rows = torch.arange(PROBE) % len(few)
    few = few.select(rows.to(tensors_of(few.inputs)[0].device))
    context = Context(copy.deepcopy(model), {"train": source_of([tuple(few)])}, output)
    ordered = waves(plan, schedule, context.graph.graph)
    with torch_threads(1):
        measured = tuple(_wave(context, few, segments, plan) for segments in ordered)
    return Estimate(
        waves=measured,
        state=sum(value.nbytes for value in context.state().values()),
        samples=samples,
        chunk=min(batch * chunk, samples),
        batch=batch,
    )


def _wave(context: Context, batch: Batch, segments: Sequence[Segment], plan: Plan) -> Wave:
    paths = [path for segment in segments for path in segment.trained]
    target = OutputTarget("smaller outputs", _smaller)

    def statistics() -> Sums:
        return sums(context, [batch], output_target=target, paths=paths, satisfied_weight=1.0, weighted=False)

    def forward() -> Any:
        with torch.no_grad():
            return context.inverse(target).forward(batch.inputs)

    found, device = statistics(), context.device
    values = [value for value in forward().values() if isinstance(value, Tensor)]
    cost = sum(segment.cost for segment in plan.segments)
    gram = sum(value.rows // PROBE * value.cross.shape[2] ** 2 * len(value.cross) for value in found.values())
    return Wave(
        segments=tuple(segment.name for segment in segments),
        operations=2 * cost + gram,
        sample_seconds=_seconds(statistics, device) / PROBE,
        forward_seconds=_seconds(forward, device) / PROBE,
        statistics=sum(value.nbytes for value in found.values()),
        add_seconds=_seconds(lambda: [added(value, value) for value in found.values()], device),
        solve_seconds=len(DAMPINGS)
        * _seconds(lambda: [value.solve(1e-2) for value in found.values()], device),
        working=2 * sum(value.nbytes for value in values) // PROBE,
    )


def _smaller(outputs: Tensor, labels: Any) -> Tensor:
    return 0.9 * outputs


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The least time of a few calls, warm; on a CPU the processor's, which others who use it do not lengthen."""
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times = []
    for _ in range(4):
        began = clock()
        function()
        if not on_cpu:
            torch.accelerator.synchronize(device)
        times.append(clock() - began)
    return min(times[1:])


def _bytes(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
