"""What the study of targets says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.frame import Outcomes, by
from benchmarks.studies.pages import grid, table_of
from benchmarks.studies.statistics import wilson

#: the share of samples that is aimed at, at every cut
AIM = 0.99

TEXT = """\
## Trustworthy targets

The target of every cut, pushed forward: the share of test samples whose output then has the label on top (of several
positions: at all of them; numbers: within a relative 1e-2 of the output target), towards a margin. *plain*: as reconstructed;
*refined*: with up to 20 Gauss–Newton steps, to any output in which the label leads by the margin, or by half of it where
more is proven to be out of reach; under Consistency, below, those samples miss that miss it by more than 1e-3 of the norm of
the output target. Node by node on chains, linearized where graphs branch. Wilson's interval at the worst cut. *moved*: mean relative distance from the anchor, the mean over all cuts. *before*: right without any target. A
recurrent network is one segment: it has no cut.
"""
HEADS = [
    "network", "weights", "samples", "before", "cuts", "plain: worst cut", "at", "mean", "moved",
    "refined: worst cut", "at", "mean", "moved", f"≥ {AIM:.0%} everywhere",
]  # fmt: skip


def section(outcomes: Outcomes) -> str:
    """The whole of it."""
    rows = list(_rows(outcomes))
    met = sum(row[-1] == "yes" for row in rows)
    known = sum(row[-1] != "" for row in rows)
    verdict = f"At least {AIM:.0%} at every cut, refined: {met} of {known} rows.\n"
    return "\n".join(
        [TEXT, table_of(HEADS, rows), verdict, "![Targets of inputs](pictures/targets-inputs.svg)\n"]
    )


def _rows(outcomes: Outcomes) -> Iterator[list[str]]:
    for (network, state), group in by(outcomes, "network", "state").items():
        ways = by(group, "refine")
        plain = cuts_of([o for (refine,), found in ways.items() if refine == 0 for o in found])
        refined = cuts_of([o for (refine,), found in ways.items() if refine > 0 for o in found])
        count = sum(o.result["samples"] for o in next(iter(ways.values())))
        before = sum(o.result["right_before"] for o in next(iter(ways.values())))
        worst = min((hits / count for hits, count, _ in refined.values()), default=None)
        yield [
            f"`{network}`",
            state,
            str(count),
            f"{100 * before / count:.0f} %",
            str(len(plain or refined)),
            *_cells(plain),
            *_cells(refined),
            "" if worst is None else "yes" if worst >= AIM else "no",
        ]


Cuts = dict[str, tuple[int, int, list[float]]]


def cuts_of(found: Outcomes) -> Cuts:
    """Hits, samples and distances of each cut, over all seeds."""
    total: Cuts = {}
    for outcome in found:
        for row in outcome.result["cuts"]:
            hits, count, moved = total.get(row["cut"], (0, 0, []))
            total[row["cut"]] = (
                hits + row["hits"],
                count + outcome.result["samples"],
                [*moved, row["moved"]],
            )
    return total


def _cells(cuts: Cuts) -> list[str]:
    if not cuts:
        return [""] * 4
    worst = min(cuts, key=lambda cut: cuts[cut][0])
    hits, count, _ = cuts[worst]
    low, high = wilson(hits, count)
    mean = sum(hits / count for hits, count, _ in cuts.values()) / len(cuts)
    distances = [distance for _, _, moved in cuts.values() for distance in moved]
    return [
        f"{100 * hits / count:.1f} % ({100 * low:.0f}–{100 * high:.0f})",
        f"`{worst}`",
        f"{100 * mean:.1f} %",
        f"{sum(distances) / len(distances):.2f}",
    ]


def pictures(outcomes: Outcomes) -> dict[str, Figure]:
    """Inputs as they are and as they should have been: where the correction was largest."""
    shown = [
        (f"{o.settings['network']}: as it is", f"should be {image['label']}", image)
        for o in outcomes
        if o.seed == 0 and o.settings["state"] == "converged"
        for image in o.result["images"]
    ]
    panels = [
        (title, _panel(image[part]))
        for first, second, image in shown
        for title, part in ((first, "anchor"), (second, "target"))
    ]
    return {"inputs": grid(panels, columns=4)} if panels else {}


def _panel(pixels: Any) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        axis.imshow(pixels, cmap="gray")
        axis.set_axis_off()

    return draw
