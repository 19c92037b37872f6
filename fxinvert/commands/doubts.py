"""Doubts about what a run is given: data that come otherwise than the model expects, answers no better than chance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from fxinvert.report.answers import Answers, answers
from fxinvert.sources import DataOptions, Preprocessing, no_better_than_chance
from fxinvert.training.batch import Batch

#: samples that are asked for
SAMPLES = 1000


def doubts(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    options: DataOptions,
    expected: Preprocessing | None,
    classes: tuple[str, ...] | None,
) -> list[str]:
    """What speaks against the data as they are given, in sentences, before anything is trained.

    Args:
        graph: the traced model.
        batches: training data, of which the first samples are looked at.
        options: how they are read.
        expected: what the model says of its inputs, if it does.
        classes: the names of the classes, if the data know them.
    """
    found = [] if expected is None else [expected.differs(options)]
    found.append(_chance(answers(graph, _few(batches)), classes))
    return [doubt for doubt in found if doubt is not None]


def _few(batches: Iterable[Batch]) -> Iterator[Batch]:
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch)
        if seen >= SAMPLES:
            return


def _chance(found: Answers, classes: tuple[str, ...] | None) -> str | None:
    head = found.heads[0]
    if len(found.heads) > 1 or not len(head.wanted):
        return None
    if not head.classes:
        error, spread = (
            float((head.given - head.wanted).double().square().mean()),
            float(head.wanted.double().var(0)),
        )
        return (
            f"before training the mean squared error is {error:.3g}; answering the mean label always has {spread:.3g}. "
            "A trained model has other inputs or other units of the labels than these data"
            if error >= spread
            else None
        )
    problem = no_better_than_chance(
        int((head.given == head.wanted).sum()),
        len(head.wanted),
        head.classes,
        int(head.wanted.bincount().max()),
    )
    if problem is None:
        return None
    order = f"; here it is {', '.join(classes)}" if classes else ""
    return (
        f"{problem}: if the model was trained, it expects its inputs otherwise (--mean, --std, --resize, the order of "
        f"colours), or the classes in another order{order}"
    )
