"""Whether anything was harmed: runs that end below their starting model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.studies.frame import Outcome, Outcomes
from benchmarks.studies.pages import table_of

#: the methods of the package, in all studies
OWN = (
    "closed_form", "recursive", "auto", "gradient", "perception", "fusion", "planning", "everything",
)  # fmt: skip

TEXT = """\
### Harm

Runs whose model ends below its starting model, by held-out loss, and on test data by accuracy and by loss: the model that a
method gives back; of AdamW the one after its last epoch, without looking at held-out data in between, at the best of its
learning rates. All runs of the paper's protocol on a network begin with the same model, whatever their seed.
"""


def end(outcome: Outcome) -> dict[str, Any]:
    """The last point of a run; of several curves, of the best by held-out loss."""
    curves = outcome.result.get("curves") or {"": outcome.result["curve"]}
    ends: list[dict[str, Any]] = [curve[-1] for curve in curves.values()]
    return min(ends, key=lambda point: point["held_out"]["loss"])


class Harm(NamedTuple):
    """How many runs end below their start."""

    held_out: int  # by loss
    accuracy: int  # on test data
    loss: int  # on test data


def harmed(runs: Outcomes) -> Harm:
    """The runs that end below their start, counted."""
    pairs = [(end(outcome), outcome.result["start"]) for outcome in runs]
    return Harm(
        held_out=sum(last["held_out"]["loss"] > start["held_out"]["loss"] for last, start in pairs),
        accuracy=sum(last["test"]["score"] < start["test"]["score"] for last, start in pairs),
        loss=sum(last["test"]["loss"] > start["test"]["loss"] for last, start in pairs),
    )


def of_methods(outcomes: Iterable[Outcome], chosen: Callable[[str], bool]) -> list[Outcome]:
    """The runs of some methods that gave a model."""
    return [o for o in outcomes if chosen(o.settings.get("method", "")) and "start" in o.result]


def section(outcomes: Outcomes, titles: dict[str, str]) -> str:
    """A row for each method."""
    rows = []
    for method, title in titles.items():
        runs = of_methods(outcomes, lambda found, m=method: found == m)  # type: ignore[misc]
        if runs:
            found = harmed(runs)
            shares = (f"{count} ({100 * count / len(runs):.0f} %)" for count in (found.accuracy, found.loss))
            rows.append([title, str(len(runs)), str(found.held_out), *shares])
    columns = ["method", "runs", "worse on held-out data", "on test data, accuracy", "on test data, loss"]
    return TEXT + "\n" + table_of(columns, rows)
