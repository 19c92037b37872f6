"""The automatic method: closed form for the first gains, gradients for the last ones; held-out data decide on each.

    what                                                      on                   networks
    batch-norm statistics, estimated anew                     all data             with batch norm
    one closed-form solve of every op, in the first sweep     the first samples    without
        and from there gradient runs as below                 all data             without
    from the model as given:
        short gradient runs, which tell the learning rate     all data             all
        gradient runs with that rate, as they help            all data             all
        the same with smaller ones, one after the other       all data             all
    a step from where these have led to where the others did                       without

What a solve gains says little about how well training goes on from it: it can save many steps, or leave behind what a network
had learned. So both ways are gone to their ends, each judged by what it gains itself, and held-out loss chooses: one of the
ends, or what lies between, since weights that were trained from the same model in two ways often do better in their mean than each
(Wortsman et al., Model soups, ICML 2022). Where a solve changes nothing there is one way.

Gradient runs propose the moving averages of their weights after 1, 2, 4, … passes, so that held-out loss also says when to
stop. What is taken of each is searched like any other step: what does not help is not taken.

Batch norm can be trained through the statistics of the batch, which is noise that keeps from overfitting, or with its
running statistics as they are, which is what the network computes later. Both are run side by side, and the mean of their
weights is proposed, too. Nothing is solved in closed form there: what an early layer of a deep network should have computed
explains little, and a last layer that is solved for few samples fits these alone.

All of this is repeated on parts of few training samples, for the mean of the weights, and of some more where held-out samples
leave doubt of the gain (`fxinvert.training.repeat`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.output_target import OutputTarget
from fxinvert.passes.plan import Segment
from fxinvert.settings import check_counts, check_numbers
from fxinvert.training.closed_form import ClosedForm
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage
from fxinvert.training.gradient import Optimizer
from fxinvert.training.joint import Course, course_stage, fit_jointly, parameters_of
from fxinvert.training.recalibrate import recalibrated, recalibration
from fxinvert.training.repeat import FEW, SOME
from fxinvert.training.replay import batch_norms
from fxinvert.training.work import Back, Proposal, Update, Work

#: steps of a short run, at least
TRIAL = 16
#: how runs from what was solved are called
SOLVED = "from the solve"


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


PLAIN = Recipe(False, ClosedForm(samples=2048, last_layer=False), (1e-2, 3e-3, 1e-3, 3e-4), {"": True})
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
        folds: of few training samples (32 to 256; up to 1,024 where held-out samples leave doubt of the gain), without each
            of which all of this is repeated, for the mean of the weights (see `fxinvert.training.repeat`); 1: it is not.
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
    follows_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(runs=self.runs, steps=self.steps, folds=self.folds)
        check_numbers("a share from 0 to below 1", lambda a: 0 <= a < 1, average=self.average)
        if self.learning_rates is not None:
            if not isinstance(self.learning_rates, Sequence) or not self.learning_rates:
                raise DataError(
                    f"learning_rates={self.learning_rates!r}; a tuple of them is needed, or None for the method's own"
                )
            for rate in self.learning_rates:
                check_numbers("a number above 0", lambda r: r > 0, learning_rates=rate)

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal] | Back]:
        """Yields what each way proposes, and a return between them; while output targets are told apart, what the solve does."""
        recipe = self._recipe(work.context)
        if work.sweep == 0 and recipe.solve is None:
            return
        if recipe.statistics:
            estimated = recalibrated(work)
            if estimated:
                yield [estimated]
        if work.sweep > 1:  # every rate has been followed as far as it helps
            return
        if recipe.solve is not None:
            yield from recipe.solve.train(work, segments)
        if work.sweep == 0:
            return
        names = self._arguments(work.context, work.output_target, segments)["names"]
        given = {name: work.begun[name] for name in names}
        now = work.context.tensors
        if recipe.solve is None or all(torch.equal(value, now[name]) for name, value in given.items()):
            yield from self._begin(work, segments, recipe)
            return
        yield from self._follow(work, segments, recipe, recipe.rates, SOLVED)
        other = {name: work.context.tensors[name].detach().clone() for name in names}
        yield Back(given)
        yield from self._begin(work, segments, recipe)
        yield [[Update(SOLVED, {name: v - work.context.tensors[name].detach() for name, v in other.items()})]]

    def folds_of(self, samples: int) -> int:
        """Of few training samples, without each of which all of this may be repeated; 1: it never is."""
        return self.folds if samples in SOME else 1

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields what `train` does in the first sweep, with as many runs as there may be, and what is or may be repeated of few
        samples or some more.
        """
        yield from self._once(probe, segments)
        if self.folds_of(probe.samples) > 1:
            without = "without a fold" if probe.samples in FEW else "without a fold, if in doubt"
            rest = probe.of(probe.samples - probe.samples // self.folds)
            for stage in self._once(rest, segments):
                tasks = tuple((f"{name}, {without}", cost) for name, cost in stage.tasks)
                yield replace(stage, tasks=tasks, times=stage.times * self.folds)

    def _once(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields what `train` does with the samples."""
        recipe = self._recipe(probe.context)
        arguments = self._arguments(probe.context, probe.output_target, segments)
        run = course_stage(probe, "", arguments, self._steps(recipe))
        # snapshots after 1, 2, 4, … passes and after all of them; of several modes their means, too
        snapshots = (run.passes - 1).bit_length() + 1
        means = 1 if len(recipe.modes) > 1 else 0

        def runs(way: str = "") -> Iterator[Stage]:
            for rate in recipe.rates:
                own = _side_by_side(run, [_name(rate, mode, way) for mode in recipe.modes])
                proposals = snapshots * (len(recipe.modes) + means)
                yield replace(own, proposals=proposals, times=self.runs)

        if recipe.statistics:
            yield from recalibration(probe)
        if recipe.solve is not None:
            yield from recipe.solve.stages(probe, segments)
            yield from runs(SOLVED)
        if len(recipe.rates) > 1:
            short = arguments | {"optimizer": replace(self.optimizer, epochs=1)}
            trial = course_stage(probe, "", short, TRIAL)
            yield _side_by_side(trial, [_name(rate, "trial") for rate in recipe.rates])
        yield from runs()

    def _recipe(self, context: Context) -> Recipe:
        """What is done with a network."""
        normalized = bool(batch_norms(context))
        own = NORMALIZED if normalized else PLAIN
        rates = own.rates if self.learning_rates is None else self.learning_rates
        return own._replace(solve=None if normalized else self.closed_form, rates=rates)

    def _begin(self, work: Work, segments: Sequence[Segment], recipe: Recipe) -> Iterator[list[Proposal]]:
        """Yields short runs with each of the learning rates, and runs with that of the one that was taken and those below."""
        if len(recipe.rates) == 1:
            yield from self._follow(work, segments, recipe, recipe.rates)
            return
        arguments = self._arguments(work.context, work.output_target, segments) | {"steps": TRIAL}
        optimizers = [replace(self.optimizer, learning_rate=rate, epochs=1) for rate in recipe.rates]
        found = work.each(fit_jointly, [arguments | {"optimizer": optimizer} for optimizer in optimizers])
        yield [
            [Update(_name(rate, "trial"), snapshots[-1])]
            for rate, (snapshots, _) in zip(recipe.rates, found, strict=True)
        ]
        begin = len(found) - 1 if work.taken is None else work.taken
        yield from self._follow(work, segments, recipe, recipe.rates[begin:])

    def _follow(
        self, work: Work, segments: Sequence[Segment], recipe: Recipe, rates: Sequence[float], way: str = ""
    ) -> Iterator[list[Proposal]]:
        """Yields what runs propose, with one learning rate after the other, each as long as it helps."""
        for rate in rates:
            courses: list[Course | None] = [None] * len(recipe.modes)
            idle = 0
            for number in range(self.runs):
                proposals, courses = self._run(work, segments, recipe, rate, number, courses, way)
                yield proposals
                idle = idle + 1 if work.gained < self.least_gain else 0
                if idle > self.patience:
                    break

    def _run(
        self,
        work: Work,
        segments: Sequence[Segment],
        recipe: Recipe,
        rate: float,
        number: int,
        courses: Sequence[Course | None],
        way: str,
    ) -> tuple[list[Proposal], list[Course | None]]:
        """What a run from each of the courses proposes, and where they have come to."""
        modes = recipe.modes
        arguments = self._arguments(work.context, work.output_target, segments) | {
            "optimizer": replace(self.optimizer, learning_rate=rate, seed=self.optimizer.seed + number),
            "steps": self._steps(recipe),
        }
        given = [
            arguments | {"normalize_by_batch": by_batch, "course": course}
            for by_batch, course in zip(modes.values(), courses, strict=True)
        ]
        found = work.each(fit_jointly, given)
        snapshots = [own for own, _ in found]
        proposals: list[Proposal] = []
        if len(modes) > 1:
            proposals += [[Update(_name(rate, "mean"), _mean(own))] for own in zip(*snapshots, strict=True)]
        for mode, own in zip(modes, snapshots, strict=True):
            proposals += [[Update(_name(rate, mode, way), changes)] for changes in own]
        return proposals, [course for _, course in found]

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


def _name(rate: float, *more: str) -> str:
    return ", ".join([f"gradient, learning rate {rate:g}", *filter(None, more)])
