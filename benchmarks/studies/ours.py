"""The package's methods, as iterators of models: one more sweep each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import fxinvert
from benchmarks.studies.baselines import Masks
from benchmarks.studies.tasks import Task
from fxinvert import models
from fxinvert.output_target import automatic
from fxinvert.passes.plan import Segment
from fxinvert.training import Auto, ClosedForm, Method, Proposal, Work

#: raised when a method of the package changes, so that it is measured anew
REVISIONS = {"closed_form": 3, "recursive": 3, "gradient": 3, "auto": 2}
SWEEPS = 3


@dataclass(frozen=True)
class Masked:
    """A method whose updates leave what is masked as it is.

    Attributes:
        inner: the method.
        masks: by parameter; 0 is what stays.
    """

    inner: Method
    masks: Masks

    @property
    def name(self) -> str:
        return f"masked {self.inner.name}"

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """The inner method's proposals, under the mask."""
        for proposals in self.inner.train(work, segments):
            yield [[self._masked(update) for update in proposal] for proposal in proposals]

    def _masked(self, update: Any) -> Any:
        changes = {
            name: change * self.masks[name] if name in self.masks else change
            for name, change in update.changes.items()
        }
        return replace(update, changes=changes)


def sweeping(task: Task, method: Method, sweeps: int = SWEEPS, **settings: Any) -> Iterator[nn.Module]:
    """Post-trains sweep by sweep; each begins with what the one before returned."""
    model, target = task.model, settings.pop("output_target", "auto")
    by_name = {t.name: t for t in automatic(task.train.labels)}
    if task.masks:
        method = Masked(method, task.masks)
    for _ in range(sweeps):
        result = fxinvert.post_train(
            model,
            task.train.batches(),
            validation_data=task.held_out.batches(),
            method=method,
            output_target=target,
            sweeps=1,
            progress=False,
            **settings,
        )
        target = by_name.get(result.output_target, target)
        yield result.model
        if not result.changed:
            break
        model = result.model


def warm_up() -> None:
    """Lets Python load what the first call needs, which takes seconds."""
    samples = models.data_of("digits_mlp").train.select(torch.arange(40))
    fxinvert.post_train(models.load("digits_mlp", "early"), samples.batches(), sweeps=1, progress=False)


def closed_form(task: Task) -> Iterator[nn.Module]:
    """With every setting left alone."""
    return sweeping(task, ClosedForm())


def recursive(task: Task) -> Iterator[nn.Module]:
    """As advised for networks that branch."""
    return sweeping(
        task,
        ClosedForm(every=256, damping=1e-3),
        schedule="parallel",
        share="none",
        output_target="cross_entropy",
        recalibrate=True,
        chunk=1,
    )


def auto(task: Task) -> Iterator[nn.Module]:
    """What the package chooses by itself, in one call."""
    result = fxinvert.post_train(
        task.model,
        task.train.batches(),
        validation_data=task.held_out.batches(),
        method=Masked(Auto(), task.masks) if task.masks else Auto(),
        progress=False,
    )
    yield result.model


METHODS: dict[str, Callable[[Task], Iterator[nn.Module]]] = {
    "closed_form": closed_form,
    "recursive": recursive,
    "auto": auto,
}
