"""The automatic method: closed form for the first gains, gradients for the last ones; held-out data decide on each.

    what                                                    on                   networks
    batch-norm statistics, estimated anew                   all data             with batch norm
    one closed-form solve of every op, in the first sweep   the first samples    without
    or, if one of them gains more, short gradient runs,     all data             all
        which tell the learning rate to begin with
    gradient runs with a large learning rate, as they help  all data             all
    the same with smaller ones, one after the other         all data             all
    beside them a run from the model as given               all data             without

The solve and the short runs compete on the last segment, too, while output targets are told apart: a last layer that was
solved can be a bad place to go on from.

Nor does the first gain of a solve say how well training goes on from it: it can leave behind what a network had learned before
its data changed. So the model as given is trained beside the runs that follow, with a middle learning rate.

Gradient runs propose the moving averages of their weights after 1, 2, 4, … passes, so that held-out loss also says when to
stop. What is taken of each is searched like any other step: what does not help is not taken.

Batch norm can be trained through the statistics of the batch, which is noise that keeps from overfitting, or with its
running statistics as they are, which is what the network computes later. Both are run side by side, and the mean of their
weights is proposed, too: means of networks that were fine-tuned from the same one do better than each (Wortsman et al.,
Model soups, ICML 2022). Nothing is solved in closed form there: what an early layer of a deep network should have computed
explains little, and a last layer that is solved for few samples fits these alone.
All of this is repeated on parts of few training samples, for the mean of the weights (`fxinvert.training.repeat`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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

#: steps of a short run, at least
TRIAL = 16
#: what the run from the model as given is called
BESIDE = "from the model as given"


class Recipe(NamedTuple):
    """What is done with a kind of networks.

    Attributes:
        statistics: whether those of batch norm are estimated anew.
        solve: how ops are solved; None: they are not.
        rates: learning rates, the largest first.
        modes: of runs side by side, by name, whether batch norm uses the statistics of the batch.
    """

    statistics: bool
    solve: ClosedForm | None
    rates: tuple[float, ...]
    modes: Mapping[str, bool]

    @property
    def middle(self) -> float:
        """The learning rate of a run that is not followed by others."""
        return self.rates[len(self.rates) // 2]

    @property
    def tried(self) -> bool:
        """Whether short runs have something to choose from, or to compete with."""
        return self.solve is not None or len(self.rates) > 1


PLAIN = Recipe(False, ClosedForm(samples=2048), (1e-2, 3e-3, 1e-3, 3e-4), {"": True})
NORMALIZED = Recipe(True, None, (3e-3, 1e-3, 3e-4), {"by batch": True, "by running statistics": False})


@dataclass(frozen=True)
class Auto:
    """Closed form where no batch norm is, then gradients of everything at once, as far as held-out loss falls.

    Attributes:
        closed_form: how ops are solved in the first sweep of networks without batch norm; None: they are not.
        learning_rates: one after the other, from the one that short runs find best; None: those of `PLAIN`, or of
            `NORMALIZED` for networks with batch norm.
        runs: with each learning rate, at most; each goes on where the one before ended.
        least_gain: the share of the held-out loss that runs must remove, or the next learning rate follows.
        patience: how many runs in a row may remove less: a step beyond where a run ended may be ahead of the next one,
            but more often the next rate is what helps.
        steps: of a run, at least, so that few samples are passed over more often; runs side by side share them.
        average: how much of the moving average of the weights is kept in a step.
        folds: of few training samples (32 to 256), without each of which all of this is repeated, for the mean of the weights
            (see `fxinvert.training.repeat`); 1: it is not.
        optimizer: of a run, with its passes over the data.
    """

    closed_form: ClosedForm | None = PLAIN.solve
    learning_rates: tuple[float, ...] | None = None
    runs: int = 6
    least_gain: float = 0.01
    patience: int = 0
    steps: int = 64
    average: float = 0.98
    folds: int = 3
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(epochs=4))
    name: str = "auto"
    schedule: str = "parallel"

    def __post_init__(self) -> None:
        if min(self.runs, self.steps, self.folds) < 1 or not 0 <= self.average < 1:
            raise DataError(
                f"runs={self.runs}, steps={self.steps}, folds={self.folds}, average={self.average}: needed are a run, a "
                "step and a fold at least, and an average from 0 to below 1"
            )

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """Yields what each stage proposes; while output targets are told apart, what the first stage does."""
        recipe = self._recipe(work.context)
        if work.sweep == 0 and recipe.solve is None:
            return
        if recipe.statistics:
            estimated = recalibrated(work)
            if estimated:
                yield [estimated]
        if work.sweep > 1:  # every rate has been followed as far as it helps
            return
        best = yield from self._begin(work, segments, recipe)
        beside = Course.beginning(work.begun) if recipe.solve is not None else None
        for rate in recipe.rates[best:] if work.sweep else ():
            courses: list[Course | None] = [None] * len(recipe.modes)
            idle = 0
            for number in range(self.runs):
                proposals, courses, beside = self._run(work, segments, recipe, rate, number, courses, beside)
                yield proposals
                idle = idle + 1 if work.gained < self.least_gain else 0
                if idle > self.patience:
                    break

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields what `train` does in the first sweep, with as many runs as there may be; once, of few samples, too."""
        recipe = self._recipe(probe.context)
        arguments = self._arguments(probe.context, probe.output_target, segments)
        short = arguments | {"optimizer": replace(self.optimizer, epochs=1)}
        trial = _side_by_side(
            course_stage(probe, "", short, TRIAL), [_name(rate, "trial") for rate in recipe.rates]
        )
        if recipe.statistics:
            yield from recalibration(probe)
        if recipe.solve is not None:
            yield from recipe.solve.stages(probe, segments)
        if recipe.tried:
            yield trial
        run = course_stage(probe, "", arguments, self._steps(recipe))
        for rate in recipe.rates:
            names = [_name(rate, mode) for mode in recipe.modes]
            if recipe.solve is not None:
                names.append(_name(recipe.middle, BESIDE))
            # snapshots after 1, 2, 4, … passes and after all of them; of several modes their means, too
            snapshots = (run.passes - 1).bit_length() + 1
            means = 1 if len(recipe.modes) > 1 else 0
            own = _side_by_side(run, names)
            yield replace(own, proposals=snapshots * (len(names) + means), times=self.runs)

    def _recipe(self, context: Context) -> Recipe:
        """What is done with a network."""
        normalized = bool(batch_norms(context))
        own = NORMALIZED if normalized else PLAIN
        rates = own.rates if self.learning_rates is None else self.learning_rates
        return own._replace(solve=None if normalized else self.closed_form, rates=rates)

    def _begin(
        self, work: Work, segments: Sequence[Segment], recipe: Recipe
    ) -> Generator[list[Proposal], None, int]:
        """Yields what competes in the beginning; returns the index of the rate to go on with."""
        trial = work.once(self.name, lambda: self._trial(work, segments, recipe)) if recipe.tried else []
        if recipe.solve is None:
            if not trial:
                return 0
            yield trial
            return len(trial) - 1 if work.taken is None else work.taken
        for solved in recipe.solve.train(work, segments):
            yield solved + trial
            if work.taken is not None and work.taken >= len(solved):
                return work.taken - len(solved)
            trial = []  # of a state that was
        return 0

    def _trial(self, work: Work, segments: Sequence[Segment], recipe: Recipe) -> list[Proposal]:
        """What short runs with each of the learning rates propose, in their order; no output target plays a part in it."""
        arguments = self._arguments(work.context, work.output_target, segments) | {"steps": TRIAL}
        optimizers = [replace(self.optimizer, learning_rate=rate, epochs=1) for rate in recipe.rates]
        found = work.each(fit_jointly, [arguments | {"optimizer": optimizer} for optimizer in optimizers])
        return [
            [Update(_name(rate, "trial"), snapshots[-1])]
            for rate, (snapshots, _) in zip(recipe.rates, found, strict=True)
        ]

    def _run(
        self,
        work: Work,
        segments: Sequence[Segment],
        recipe: Recipe,
        rate: float,
        number: int,
        courses: list[Course | None],
        beside: Course | None,
    ) -> tuple[list[Proposal], list[Course | None], Course | None]:
        """What a run from each of the courses proposes, and where they have come to."""
        modes = recipe.modes

        def arguments(rate: float, by_batch: bool, course: Course | None) -> dict[str, Any]:
            return self._arguments(work.context, work.output_target, segments) | {
                "optimizer": replace(self.optimizer, learning_rate=rate, seed=self.optimizer.seed + number),
                "steps": self._steps(recipe),
                "normalize_by_batch": by_batch,
                "course": course,
            }

        names = [_name(rate, mode) for mode in modes]
        given = [arguments(rate, *own) for own in zip(modes.values(), courses, strict=True)]
        if beside is not None:
            names.append(_name(recipe.middle, BESIDE))
            given.append(arguments(recipe.middle, True, beside))
        found = work.each(fit_jointly, given)
        snapshots, ended = [own for own, _ in found], [course for _, course in found]
        proposals: list[Proposal] = []
        if len(modes) > 1:
            proposals += [[Update(_name(rate, "mean"), _mean(own))] for own in zip(*snapshots, strict=True)]
        for name, own in zip(names, snapshots, strict=True):
            proposals += [[Update(name, changes)] for changes in own]
        return proposals, ended[: len(modes)], None if beside is None else ended[-1]

    def _steps(self, recipe: Recipe) -> int:
        """Of each of the runs side by side, at least."""
        return -(-self.steps // len(recipe.modes))

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


def _side_by_side(stage: Stage, names: Sequence[str]) -> Stage:
    """The stage with its task done under each of some names, each of which proposes something."""
    ((_, cost),) = stage.tasks
    return replace(stage, tasks=tuple((name, cost) for name in names), proposals=len(names))


def _mean(changes: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of changes by name; what is missing in some stays there."""
    names = dict.fromkeys(name for own in changes for name in own)
    total = {name: torch.stack([own[name] for own in changes if name in own]).sum(0) for name in names}
    return {name: value / len(changes) for name, value in total.items()}


def _name(rate: float, mode: str) -> str:
    return f"gradient, learning rate {rate:g}" + (f", {mode}" if mode else "")
