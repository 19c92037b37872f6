"""The automatic method: closed form for the first gains, gradients for the last ones; held-out data decide on each.

    what                                                     on
    batch-norm statistics, estimated anew                    all data
    one closed-form solve of every op, in the first sweep    the first samples
    gradient runs with a large learning rate, as they help   all data
    the same with smaller ones, one after the other          all data

Gradient runs propose the moving averages of their weights after 1, 2, 4, … passes, so that held-out loss also says when to
stop. What is taken of each is searched like any other step: what does not help is not taken, and a learning rate that is
too large costs one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxinvert.errors import DataError
from fxinvert.output_target import OutputTarget
from fxinvert.passes.plan import Segment
from fxinvert.training.closed_form import ClosedForm
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage
from fxinvert.training.gradient import Optimizer
from fxinvert.training.joint import Course, course_stage, fit_jointly, parameters_of
from fxinvert.training.recalibrate import recalibrated, recalibration
from fxinvert.training.work import Proposal, Update, Work


@dataclass(frozen=True)
class Auto:
    """Closed form, then gradients of everything at once, as far as held-out loss falls.

    Attributes:
        closed_form: how ops are solved, in the first sweep; None: they are not.
        learning_rates: one after the other.
        runs: with each learning rate, at most; each goes on where the one before ended.
        least_gain: the share of the held-out loss that runs must remove, or the next learning rate follows.
        patience: how many runs in a row may remove less: a step beyond where a run ended may be ahead of the next one,
            but more often the next rate is what helps.
        steps: of a run, at least, so that few samples are passed over more often.
        average: how much of the moving average of the weights is kept in a step.
        optimizer: of a run, with its passes over the data.
    """

    closed_form: ClosedForm | None = field(default_factory=lambda: ClosedForm(samples=2048))
    learning_rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
    runs: int = 6
    least_gain: float = 0.01
    patience: int = 0
    steps: int = 64
    average: float = 0.98
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(epochs=4))
    name: str = "auto"
    schedule: str = "parallel"

    def __post_init__(self) -> None:
        if self.runs < 1 or self.steps < 1 or not 0 <= self.average < 1:
            raise DataError(
                f"runs={self.runs}, steps={self.steps}, average={self.average}: needed are a run and a step at least, "
                "and an average from 0 to below 1"
            )

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """Yields what each stage proposes; output targets are told apart in closed form, if ops are solved so."""
        if self.closed_form is not None and work.sweep == 0:
            yield from self.closed_form.train(work, segments)
            return
        estimated = recalibrated(work)
        if estimated:
            yield [estimated]
        # later on, gradients have left little to a linear solve
        if self.closed_form is not None and work.sweep == 1:
            yield from self.closed_form.train(work, segments)
        for rate in self.learning_rates:
            course: Course | None = None
            idle = 0
            for number in range(self.runs):
                proposals, course = self._run(work, segments, rate, number, course)
                yield proposals
                idle = idle + 1 if work.gained < self.least_gain else 0
                if idle > self.patience:
                    break

    def _run(
        self, work: Work, segments: Sequence[Segment], rate: float, number: int, course: Course | None
    ) -> tuple[list[Proposal], Course]:
        optimizer = replace(self.optimizer, learning_rate=rate, seed=self.optimizer.seed + number)
        arguments = self._arguments(work.context, work.output_target, segments) | {
            "optimizer": optimizer,
            "steps": self.steps,
            "course": course,
        }
        ((snapshots, course),) = work.each(fit_jointly, [arguments])
        return [[Update(_name(rate), changes)] for changes in snapshots], course

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields what `train` does, with as many runs as there may be."""
        yield from recalibration(probe)
        if self.closed_form is not None:
            yield from self.closed_form.stages(probe, segments)
        arguments = self._arguments(probe.context, probe.output_target, segments)
        run = course_stage(probe, "", arguments, self.steps)
        # snapshots after 1, 2, 4, … passes and after all of them
        proposals = (run.passes - 1).bit_length() + 1
        for rate in self.learning_rates:
            ((_, cost),) = run.tasks
            yield replace(run, tasks=((_name(rate), cost),), proposals=proposals, times=self.runs)

    def _arguments(
        self, context: Context, output_target: OutputTarget, segments: Sequence[Segment]
    ) -> dict[str, Any]:
        return {
            "output_target": output_target,
            "exit_path": segments[-1].exit,
            "names": parameters_of(context, [path for s in segments for path in s.nodes]),
            "alpha": 0.0,
            "optimizer": self.optimizer,
            "average": self.average,
        }


def _name(rate: float) -> str:
    return f"gradient, learning rate {rate:g}"
