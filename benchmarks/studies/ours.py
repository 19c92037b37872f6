"""The package's methods, as iterators of models: one more sweep, or one more step, each time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fxinvert
from benchmarks.studies.curve import Timed, settle
from benchmarks.studies.tasks import Task
from fxinvert import models
from fxinvert.output_target import automatic
from fxinvert.result import Record
from fxinvert.training import ClosedForm, Method
from fxinvert.training.repeat import FEW, SOME

#: raised when a method of the package changes, so that it is measured anew
REVISIONS = {"closed_form": 6, "recursive": 7, "auto": 8}
#: of what does otherwise with few training samples, with some more, with many: in networks without batch norm, and with
AUTO_REVISIONS = {False: (10, 12, 8), True: (6, 8, 5)}
SWEEPS = 3


def revision(method: str, samples: int, *, normalized: bool) -> int:
    """Of a method with so many training samples, in networks with batch norm or without."""
    if method != "auto":
        return REVISIONS[method]
    few, some, many = AUTO_REVISIONS[normalized]
    return few if samples in FEW else some if samples in SOME else many


def sweeping(task: Task, method: Method, sweeps: int = SWEEPS, **settings: Any) -> Iterator[nn.Module]:
    """Post-trains sweep by sweep; each begins with what the one before returned."""
    model, target = task.model, settings.pop("output_target", "auto")
    by_name = {t.name: t for t in automatic(task.train.labels)}
    for _ in range(sweeps):
        result = fxinvert.post_train(
            model,
            task.train.batches(),
            validation_data=task.held_out.batches(),
            method=method,
            output_target=target,
            sweeps=1,
            keep_zeros=task.masks is not None,
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
    settle()


def closed_form(task: Task) -> Iterator[nn.Module]:
    """With every setting left alone."""
    return sweeping(task, ClosedForm())


def closed_form_by_steps(task: Task) -> Iterator[Timed]:
    """The same in one call: what would be returned after each step, and at last what is."""
    shown, began = list[Timed](), time.process_time()

    def watch(_: Record, model: nn.Module) -> None:
        shown.append(Timed(time.process_time() - began, model))

    result = fxinvert.post_train(
        task.model,
        task.train.batches(),
        validation_data=task.held_out.batches(),
        keep_zeros=task.masks is not None,
        progress=False,
        watch=watch,
    )
    shown.append(Timed(time.process_time() - began, result.model))
    yield from shown


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
        method="auto",
        keep_zeros=task.masks is not None,
        progress=False,
    )
    yield result.model


METHODS: dict[str, Callable[[Task], Iterator[nn.Module]]] = {
    "closed_form": closed_form,
    "recursive": recursive,
    "auto": auto,
}
