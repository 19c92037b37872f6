"""What the study of scale says: a table and a picture for each axis, with fitted exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.frame import Outcome, Outcomes
from benchmarks.studies.pages import grid, table_of

#: what is measured, by how it is called: the figure, and its unit
FIGURES: dict[str, tuple[Callable[[Outcome], float], str]] = {
    "time": (lambda outcome: outcome.result["seconds"], "s"),
    "memory": (lambda outcome: outcome.result["bytes"] / 2**20, "MiB"),
    "forward pass": (lambda outcome: outcome.result["forward"], "s"),
}

TEXT = """\
## Scale

One sweep, all layers from one snapshot, over networks of 3×3 convolutions that keep the size of their images: *depth*
convolutions of *width* channels, images of *size*² pixels, *samples* in batches of 64. One of these is varied, the others
stay at {base}.
(Convolutions between at most 2,048 values may be decomposed into singular values, which takes another time; these here
have more.) Time: processor seconds; with *workers* those of the main process and an equal share of what workers did. Every
worker traces the model and factorizes its operators for itself: shared out is what grows with the samples. Memory: what the
main process had at most, less what it had before. The exponent b of a·xᵇ is fitted to all values by least squares in
logarithms.
"""


def section(outcomes: Outcomes) -> str:
    """The part of the page."""
    base = _base(outcomes)
    rows, exponents = [], []
    for axis, found in _axes(outcomes).items():
        for outcome in found:
            figures = [f"{figure(outcome):.3g}" for figure, _ in FIGURES.values()]
            passes = outcome.result["seconds"] / outcome.result["forward"]
            rows.append((axis, str(outcome.settings[axis]), *figures, f"{passes:.0f}"))
        fits = [_exponent(axis, found, figure) for figure, _ in FIGURES.values()]
        exponents.append((axis, *("" if math.isnan(fit) else f"{round(fit, 2) + 0.0:.2f}" for fit in fits)))
    headers = [f"{name}, {unit}" for name, (_, unit) in FIGURES.items()]
    return "\n".join(
        [
            TEXT.format(
                base=", ".join(f"{axis} {value}" for axis, value in base.items() if axis != "workers")
            ),
            table_of(("axis", *(f"exponent of {name}" for name in FIGURES)), exponents),
            "![Time, memory and a forward pass along each axis](pictures/scale-axes.svg)\n",
            table_of(("axis", "value", *headers, "forward passes"), rows),
        ]
    )


def pictures(outcomes: Outcomes) -> Mapping[str, Figure]:
    """A panel for each axis."""
    panels = [(axis, partial(_draw, axis, found)) for axis, found in _axes(outcomes).items()]
    return {"axes": grid(panels)}


def _draw(axis: str, found: Sequence[Outcome], axes: Axes) -> None:
    for name, (figure, unit) in FIGURES.items():
        values = [outcome.settings[axis] for outcome in found]
        axes.loglog(values, [figure(outcome) for outcome in found], marker="o", label=f"{name}, {unit}")
    axes.set_xlabel(axis)
    axes.legend()


def _base(outcomes: Outcomes) -> dict[str, int]:
    """The settings that are the most frequent."""
    names = outcomes[0].settings
    values = {name: [outcome.settings[name] for outcome in outcomes] for name in names}
    return {name: max(found, key=found.count) for name, found in values.items()}


def _axes(outcomes: Outcomes) -> dict[str, list[Outcome]]:
    """The outcomes along each axis, the others at their base; workers begin with one."""
    base = _base(outcomes)
    along = {
        axis: [o for o in outcomes if all(o.settings[name] == base[name] for name in base if name != axis)]
        for axis in base
    }
    along["workers"] = [outcome for outcome in along["workers"] if outcome.settings["workers"]]
    return {axis: sorted(found, key=lambda o: int(o.settings[axis])) for axis, found in along.items()}


def _exponent(axis: str, found: Sequence[Outcome], figure: Callable[[Outcome], float]) -> float:
    """b of a·xᵇ; NaN where that cannot be told."""
    points = [(math.log(o.settings[axis]), math.log(figure(o))) for o in found if figure(o) > 0]
    mean = sum(x for x, _ in points) / max(len(points), 1)
    spread = sum((x - mean) ** 2 for x, _ in points)
    return sum((x - mean) * y for x, y in points) / spread if spread else math.nan
