"""What the study of driving says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.curve import best, running
from benchmarks.studies.frame import Outcome, Outcomes, by
from benchmarks.studies.pages import grid, table_of
from benchmarks.studies.statistics import Interval

METHODS = {
    "perception": "perception alone",
    "fusion": "fusion alone",
    "planning": "planning alone",
    "everything": "every module, closed form",
    "adamw": "every module, AdamW, equal time",
}
MODULES = ("perception", "fusion", "planning")

TEXT = """\
## Driving

The reference network `driving` (camera image and ego state → steering and speed) meets a camera that was mounted otherwise, or
one of its modules is damaged (noise of half their spread on its weights). Labelled scenes, a fifth kept aside: closed form on one
module alone or on all, and AdamW on everything (best of four learning rates by held-out loss, as long as closed form on every
module took). Mean R² of steering and speed on 500 new scenes; *as before*: on the same scenes seen by the camera it knew.
"""


def section(outcomes: Outcomes) -> str:
    """The whole of it."""
    explained, measured = parted(outcomes)
    parts = [TEXT]
    if measured:
        heads = [
            "fault",
            "samples",
            "seeds",
            "at the start",
            *METHODS.values(),
            "as before: start",
            "every module",
            "AdamW",
        ]
        parts += [table_of(heads, _scores(measured)), "![R² over time](pictures/driving-time.svg)\n"]
    if explained:
        parts += [
            EXPLAINED,
            table_of(EXPLAIN_HEADS, _verdicts(explained, measured)),
            _summary(explained, measured),
        ]
    return "\n".join(parts)


def parted(outcomes: Outcomes) -> tuple[list[Outcome], list[Outcome]]:
    """Explanations, and repairs."""
    groups = by(outcomes, "method")
    repairs = [o for (method,), found in groups.items() if method != "explain" for o in found]
    return groups.get(("explain",), []), repairs


def _point(outcome: Outcome, seconds: float = float("inf")) -> dict[str, Any]:
    curves = outcome.result["curves"].values()
    points = [best([outcome.result["start"], *curve], seconds) for curve in curves]
    return min(points, key=lambda point: point["held_out"]["loss"])


def _end(outcome: Outcome) -> float:
    return float(max(curve[-1]["seconds"] for curve in outcome.result["curves"].values()))


def _scores(measured: Outcomes) -> Iterator[list[str]]:
    for (fault, samples), group in by(measured, "fault", "samples").items():
        runs = by(group, "method")
        limits = {o.seed: _end(o) for o in runs.get(("everything",), [])}
        start = Interval.of([o.result["start"]["test"]["score"] for o in group])
        before = Interval.of([o.result["start"]["unshifted"]["score"] for o in group])

        def cell(method: str, part: str = "test") -> str:
            found = runs.get((method,), [])  # noqa: B023 (called at once)
            limit = limits if method == "adamw" else {}  # noqa: B023
            scores = [_point(o, limit.get(o.seed, float("inf")))[part]["score"] for o in found]
            return _r2(Interval.of(scores)) if scores else ""

        seeds = len({o.seed for o in group})
        kept = [cell(method, "unshifted") for method in ("everything", "adamw")]
        yield [
            fault,
            str(samples),
            str(seeds),
            _r2(start, False),
            *map(cell, METHODS),
            _r2(before, False),
            *kept,
        ]


def _r2(interval: Interval, half: bool = True) -> str:
    spread = f" ± {interval.half:.3f}" if half and interval.count > 1 else ""
    return f"{interval.mean:.3f}{spread}"


EXPLAINED = """\
### Which module was wrong?

`explain` on 64 test scenes: the mean part of the correction that the joint correction gives to each module, and how far its
output would have to move, relatively. *Departs*: how far the mean of what it computes lies from the mean for 256 other scenes
before the fault, in standard deviations; the first module in the order of the network that departs by more than a quarter is
named. *By repair*: the module whose repair alone leaves the least held-out loss.
"""
EXPLAIN_HEADS = [
    "fault", "at fault", "seed", *(f"{m}: part (moved), departs" for m in MODULES),
    "largest part", "first to depart", "by repair",
]  # fmt: skip
#: standard deviations; the mean of as many scenes again lies within a tenth
DEPARTS = 0.25


def _verdicts(explained: Outcomes, measured: Outcomes) -> Iterator[list[str]]:
    for outcome in explained:
        parts, moved, departs = (outcome.result[name] for name in ("parts", "moved", "departs"))
        yield [
            outcome.settings["fault"],
            outcome.result["at_fault"],
            str(outcome.seed),
            *(f"{parts[m]:.2f} ({moved[m]:.2f}), {departs[m]:.2f}" for m in MODULES),
            _largest(outcome),
            _first_to_depart(outcome),
            _by_repair(outcome, measured),
        ]


def _largest(outcome: Outcome) -> str:
    parts: dict[str, float] = outcome.result["parts"]
    return max(parts, key=parts.__getitem__)


def _first_to_depart(outcome: Outcome) -> str:
    departs: dict[str, float] = outcome.result["departs"]
    return next((module for module in MODULES if departs[module] > DEPARTS), "")


def _by_repair(outcome: Outcome, measured: Outcomes) -> str:
    losses = {
        o.settings["method"]: _point(o)["held_out"]["loss"]
        for o in measured
        if o.seed == outcome.seed
        and o.settings["fault"] == outcome.settings["fault"]
        and o.settings["method"] in MODULES
    }
    return min(losses, key=losses.__getitem__) if len(losses) == len(MODULES) else ""


def named(explained: Outcomes, measured: Outcomes) -> dict[str, tuple[int, int]]:
    """How often each way names the module at fault, and of how many."""
    ways = {
        "the largest part": [_largest(o) == o.result["at_fault"] for o in explained],
        "the first to depart": [_first_to_depart(o) == o.result["at_fault"] for o in explained],
        "the repair of one module": [_by_repair(o, measured) == o.result["at_fault"] for o in explained],
    }
    return {way: (sum(right), len(right)) for way, right in ways.items()}


def _summary(explained: Outcomes, measured: Outcomes) -> str:
    ways = named(explained, measured).items()
    found = "; ".join(f"{way}: {right} of {count}" for way, (right, count) in ways)
    return f"The module at fault was named by {found}.\n"


def pictures(outcomes: Outcomes) -> dict[str, Figure]:
    """R² over processor time, first seed."""
    measured = [o for o in outcomes if o.settings["method"] != "explain" and o.seed == 0]
    groups = by(measured, "fault")
    return {"time": grid([(fault, _panel(group)) for (fault,), group in groups.items()])} if groups else {}


def _panel(group: list[Outcome]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for outcome in group:
            method = outcome.settings["method"]
            for rate, curve in outcome.result["curves"].items():
                points = list(running(curve))
                at, scores = [p["seconds"] for p in points], [p["test"]["score"] for p in points]
                if method == "adamw":
                    axis.plot(at, scores, linewidth=0.8, linestyle="--", label=f"AdamW {rate}")
                else:
                    axis.plot(at, scores, marker="o", markersize=3, label=method)
        axis.axhline(group[0].result["start"]["test"]["score"], color="grey", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("seconds")
        axis.legend(fontsize=5)

    return draw
