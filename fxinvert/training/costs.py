"""What methods cost: each tells the stages of its work, measured on a few samples, before any of it is done.

Operations are counted while they run, so that they are those of the way that the work takes: inverses, Jacobians,
Gram matrices and gradients included.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxinvert.heads import Heads
from fxinvert.output_target import output_target
from fxinvert.passes.capture import evaluating
from fxinvert.passes.plan import Segment
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.data import Batches
from fxinvert.training.fingerprint import HELD_OUT
from fxinvert.training.judge import Candidate, tallies
from fxinvert.training.outputs import Remembered
from fxinvert.training.work import Job, Update

#: multiply-adds of the forward pass that jobs are measured with, and the samples that these are at least
MEASURED, LEAST = 2 * 10**9, 8
#: calls that a job is timed in, at most, and seconds after which there are no more: long ones are not disturbed by much
CALLS, LONG = 3, 1.0
#: how much smaller the outputs are that a measured job asks for
SMALLER = 0.9


@dataclass(frozen=True)
class Cost:
    """What a job takes for every sample that it is given.

    Attributes:
        operations: multiply-adds of its products and convolutions.
        seconds: of one thread here; on a CPU the processor's, which others who use it do not lengthen.
    """

    operations: float
    seconds: float


@dataclass(frozen=True)
class Stage:
    """Tasks that are done at the same time, what follows from their results, and what is proposed then.

    Attributes:
        tasks: what each does, and what it costs.
        by_chunk: whether its only task is done for every chunk of the data; otherwise each is done with all of them.
        samples: of the training data, that it uses.
        memory: bytes that a task works with.
        sent: bytes that a task gives back.
        passes: over the samples.
        add_seconds, solve_seconds: of adding a result to others, and of what follows from the sum.
        solve_operations: multiply-adds of the latter, where they count.
        proposals, updates: alternatives that are judged, and the updates of each.
        times: how often all of this is done, at most, one after the other.
        judged: what a candidate costs per sample, where it changes less than the segments; None: what these do.
    """

    tasks: tuple[tuple[str, Cost], ...]
    by_chunk: bool
    samples: int
    memory: float
    sent: int
    passes: int = 1
    add_seconds: float = 0.0
    solve_seconds: float = 0.0
    solve_operations: float = 0.0
    proposals: int = 1
    updates: int = 1
    times: int = 1
    judged: Cost | None = None


@runtime_checkable
class Estimated(Protocol):
    """A method that tells what it will cost."""

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """What training some segments together will take, one stage after the other.

        Args:
            probe: measures jobs.
            segments: the segments.
        """
        ...


class Probe:
    """A few samples, on which methods measure their jobs.

    Args:
        context: the model.
        batch: a few samples, whose labels do not matter.
        samples: how many there will be to train on, held-out ones included.
        batch_size, chunk: of them in a batch, and in a chunk.
        cost: multiply-adds of a forward pass per sample.

    Attributes:
        output_target: what jobs are to ask for.
        samples: how many there will be to train on, without held-out ones.
        batch_size, chunk: of these in a batch, and in a chunk.
        rows: how many are measured at once, at most.
        values: bytes of the values of one sample in a forward pass.
    """

    def __init__(
        self, context: Context, batch: Batch, samples: int, batch_size: int, chunk: int, cost: int
    ) -> None:
        self.context, self.output_target = context, output_target("regression")
        self.samples, self.batch_size, self.chunk = map(_trained, (samples, batch_size, chunk))
        self.rows = min(max(MEASURED // max(cost, 1), LEAST), self.batch_size)
        many = batch.select(torch.arange(self.rows) % len(batch))
        with torch.no_grad(), evaluating(context.graph):
            inverse = context.inverse(self.output_target)
            values = inverse.forward(many.inputs)
        output = SMALLER * values[inverse.output_node]
        heads = Heads.of(context.graph)
        labels = [own for own, _ in heads.pairs(output, [None] * len(heads.heads))]
        self._batch = Batch(many.inputs, labels if heads.heads else output)
        held = [value for node, value in values.items() if node.op != "get_attr"]
        self.values = sum(value.nbytes for value in held if isinstance(value, Tensor)) // self.rows

    def of(self, samples: int) -> Probe:
        """The same of so many samples to train on."""
        other = copy.copy(self)
        other.samples = samples
        return other

    def measured(self, job: Job, arguments: Mapping[str, Any], rows: int | None = None) -> tuple[Cost, Any]:
        """What a job takes per sample and pass, and what it gives.

        Args:
            job: what is measured.
            arguments: of the job.
            rows: samples that it is given at once, at most; None: as many as are measured.
        """
        few = self._batch.select(torch.arange(min(rows or self.rows, self.rows)))
        batches = _Counting(few, self.context.device)

        def do() -> Any:
            return job(self.context, batches, **arguments)

        do()
        with FlopCounterMode(display=False) as counter:
            batches.seen = 0
            result = do()
        seen = batches.seen
        return Cost(counter.get_total_flops() / 2 / seen, self.seconds(do) / seen), result

    def judged(self, names: Iterable[str]) -> Cost:
        """What judging a change of some parameters takes per sample, once what comes before them is known."""
        update = Update("", {name: torch.zeros_like(self.context.tensors[name]) for name in names})
        given = {"proposals": [[update]], "candidates": [Candidate(0, (1.0,))], "outputs_over": Remembered()}
        cost, _ = self.measured(tallies, given)
        return cost

    def seconds(self, function: Callable[[], Any]) -> float:
        """The least time of a few calls; on a CPU the processor's."""
        device = self.context.device
        on_cpu = device.type == "cpu"
        clock, times = time.process_time if on_cpu else time.perf_counter, list[float]()
        while len(times) < CALLS and sum(times) < LONG:
            began = clock()
            function()
            if not on_cpu:
                torch.accelerator.synchronize(device)
            times.append(clock() - began)
        return min(times)


class _Counting:
    """One batch, read as data are, again and again; counts the samples that it gives."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.batches, self.seen = Batches([tuple(batch)], device), 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.seen += len(batch)
            yield batch


def size_of(result: Any) -> int:
    """Bytes of a result that is stored or sent."""
    buffer = io.BytesIO()
    torch.save(result, buffer)
    return buffer.tell()


def _trained(samples: int) -> int:
    """How many of some samples are trained on, a fifth being held out."""
    return max(math.ceil(samples * (1 - 1 / HELD_OUT)), 1)
