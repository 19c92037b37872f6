"""The automatic method: closed form for the first gains, gradients for the last ones; held-out data decide on each.

    what                                                     on                   networks
    batch-norm statistics, estimated anew                    all data             with batch norm
    one closed-form solve of every op, in the first sweep,   the first samples    without
        or a gradient run in its place if that gains more    all data             without
    short gradient runs, which tell the learning rate        all data             with batch norm
    gradient runs with a large learning rate, as they help   all data             all
    the same with smaller ones, one after the other          all data             all

Gradient runs propose the moving averages of their weights after 1, 2, 4, … passes, so that held-out loss also says when to
stop. What is taken of each is searched like any other step: what does not help is not taken, and a learning rate that is
too large costs one run.

Batch norm can be trained through the statistics of the batch, which is noise that keeps from overfitting, or with its
running statistics as they are, which is what the network computes later. Both are run side by side, and the mean of their
weights is proposed, too: means of networks that were fine-tuned from the same one do better than each (Wortsman et al.,
Model soups, ICML 2022). Nothing is solved in closed form there: what an early layer of a deep network should have computed
explains little, and a last layer that is solved for few samples fits these alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.output_target import OutputTarget
from fxinvert.passes.plan import Segment
from fxinvert.training.closed_form import ClosedForm
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage
from fxinvert.training.gradient import Optimizer
from fxinvert.training.joint import Course, course_stage, fit_jointly, parameters_of
from fxinvert.training.recalibrate import recalibrated, recalibration
from fxinvert.training.replay import batch_norms
from fxinvert.training.work import Proposal, Update, Work

#: learning rates, without batch norm
RATES = (1e-2, 3e-3, 1e-3, 3e-4)
#: with it: large steps unsettle deep networks, of few samples for good, so that short runs of at least so many steps tell
#: with which to begin
NORMALIZED_RATES = (3e-3, 1e-3, 3e-4)
TRIAL = 16


@dataclass(frozen=True)
class Auto:
    """Closed form where no batch norm is, then gradients of everything at once, as far as held-out loss falls.

    Attributes:
        closed_form: how ops are solved in the first sweep of networks without batch norm; None: they are not.
        learning_rates: one after the other; None: `RATES`, or `NORMALIZED_RATES` in networks with batch norm.
        runs: with each learning rate, at most; each goes on where the one before ended.
        least_gain: the share of the held-out loss that runs must remove, or the next learning rate follows.
        patience: how many runs in a row may remove less: a step beyond where a run ended may be ahead of the next one,
            but more often the next rate is what helps.
        steps: of a run, at least, so that few samples are passed over more often; runs side by side share them.
        average: how much of the moving average of the weights is kept in a step.
        optimizer: of a run, with its passes over the data.
    """

    closed_form: ClosedForm | None = field(default_factory=lambda: ClosedForm(samples=2048))
    learning_rates: tuple[float, ...] | None = None
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
        """Yields what each stage proposes; output targets are told apart in closed form, where ops are solved so."""
        normalized = bool(batch_norms(work.context))
        closed_form = None if normalized else self.closed_form
        if work.sweep == 0:
            if closed_form is not None:
                yield from closed_form.train(work, segments)
            return
        if normalized:
            estimated = recalibrated(work)
            if estimated:
                yield [estimated]
            if work.sweep > 1:  # every rate has been followed as far as it helps
                return
        rates = self._rates(normalized)
        # later on, gradients have left little to a linear solve
        if closed_form is not None and work.sweep == 1:
            for number, proposals in enumerate(closed_form.train(work, segments)):
                if rates and number == 0:
                    proposals += self._run(work, segments, rates[0], 0, [None])[0]
                yield proposals
        if normalized and len(rates) > 1:
            yield self._trial(work, segments, rates)
            rates = rates[-1:] if work.taken is None else rates[work.taken :]
        for rate in rates:
            courses: list[Course | None] = [None] * len(_modes(normalized))
            idle = 0
            for number in range(self.runs):
                proposals, courses = self._run(work, segments, rate, number, courses)
                yield proposals
                idle = idle + 1 if work.gained < self.least_gain else 0
                if idle > self.patience:
                    break

    def _rates(self, normalized: bool) -> tuple[float, ...]:
        if self.learning_rates is not None:
            return self.learning_rates
        return NORMALIZED_RATES if normalized else RATES

    def _trial(self, work: Work, segments: Sequence[Segment], rates: Sequence[float]) -> list[Proposal]:
        """What short runs with each of the learning rates propose, in their order."""
        arguments = self._arguments(work.context, work.output_target, segments) | {"steps": TRIAL}
        optimizers = [replace(self.optimizer, learning_rate=rate, epochs=1) for rate in rates]
        found = work.each(fit_jointly, [arguments | {"optimizer": optimizer} for optimizer in optimizers])
        return [
            [Update(_name(rate, "trial"), snapshots[-1])]
            for rate, (snapshots, _) in zip(rates, found, strict=True)
        ]

    def _run(
        self, work: Work, segments: Sequence[Segment], rate: float, number: int, courses: list[Course | None]
    ) -> tuple[list[Proposal], list[Course | None]]:
        """What a run from each of the courses proposes, and where they have come to."""
        modes = _modes(len(courses) > 1)
        optimizer = replace(self.optimizer, learning_rate=rate, seed=self.optimizer.seed + number)
        arguments = self._arguments(work.context, work.output_target, segments) | {
            "optimizer": optimizer,
            "steps": -(-self.steps // len(modes)),
        }
        found = work.each(
            fit_jointly,
            [
                arguments | {"normalize_by_batch": by_batch, "course": course}
                for by_batch, course in zip(modes.values(), courses, strict=True)
            ],
        )
        snapshots = [own for own, _ in found]
        proposals: list[Proposal] = []
        if len(modes) > 1:
            proposals += [[Update(_name(rate, "mean"), _mean(own))] for own in zip(*snapshots, strict=True)]
        for mode, own in zip(modes, snapshots, strict=True):
            proposals += [[Update(_name(rate, mode), changes)] for changes in own]
        return proposals, [course for _, course in found]

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields what `train` does, with as many runs as there may be."""
        normalized = bool(batch_norms(probe.context))
        if normalized:
            yield from recalibration(probe)
        elif self.closed_form is not None:
            yield from self.closed_form.stages(probe, segments)
        modes = _modes(normalized)
        arguments = self._arguments(probe.context, probe.output_target, segments)
        run = course_stage(probe, "", arguments, -(-self.steps // len(modes)))
        rates = self._rates(normalized)
        if normalized and len(rates) > 1:
            short = replace(self.optimizer, epochs=1)
            trial = course_stage(probe, "", arguments | {"optimizer": short}, TRIAL)
            ((_, cost),) = trial.tasks
            tasks = tuple((_name(rate, "trial"), cost) for rate in rates)
            yield replace(trial, tasks=tasks, proposals=len(rates))
        ((_, cost),) = run.tasks
        # snapshots after 1, 2, 4, … passes and after all of them
        proposals = (run.passes - 1).bit_length() + 1
        if len(modes) > 1:  # and their means
            proposals *= len(modes) + 1
        beside = 0 if normalized or self.closed_form is None else 1
        for index, rate in enumerate(rates):
            tasks = tuple((_name(rate, mode), cost) for mode in modes)
            times = self.runs + (beside if index == 0 else 0)
            yield replace(run, tasks=tasks, proposals=proposals, times=times)

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


def _modes(normalized: bool) -> dict[str, bool]:
    """Whether batch norm uses the statistics of the batch, in each of the runs side by side, by their names."""
    return {"by batch": True, "by running statistics": False} if normalized else {"": True}


def _mean(changes: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of changes by name; what is missing in some stays there."""
    names = dict.fromkeys(name for own in changes for name in own)
    total = {name: torch.stack([own[name] for own in changes if name in own]).sum(0) for name in names}
    return {name: value / len(changes) for name, value in total.items()}


def _name(rate: float, mode: str) -> str:
    return f"gradient, learning rate {rate:g}" + (f", {mode}" if mode else "")
