"""What the study of repairs says: tables, curves, and whether anything was harmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies import harm
from benchmarks.studies.curve import PATIENCE, Curve, best, running
from benchmarks.studies.frame import Outcome, Outcomes, by
from benchmarks.studies.pages import grid, table_of
from benchmarks.studies.statistics import Interval

ADAMW = "adamw"
#: of the point of AdamW's curve that is five epochs
FIVE_EPOCHS = 3
OWN = {"closed_form": "closed form", "recursive": "recursive closed form", "auto": '`method="auto"`'}
TITLES = OWN | {
    ADAMW: "AdamW",
    "last_layer": "last layer, least squares",
    "batch_norm": "batch-norm statistics",
}
NETWORKS = {
    "digits_cnn": "digits, CNN",
    "digits_resnet": "digits, residual network",
    "mnist_cnn": "MNIST, SimpleCNN",
    "cifar_cnn": "CIFAR-10, SimpleCNN",
    "resnet20": "CIFAR-10, ResNet-20",
}

TEXT = """\
## Repair

One starting model for each task; every seed draws other samples to repair it with (equally many of each class). A fifth of
them is kept aside: steps, learning rates, ridges and when to stop are chosen on it by every method alike. Test accuracy in
percent. AdamW trains everything on cross-entropy (batch 64) at four learning rates
(1e-4, 3e-4, 1e-3, 3e-3); the one with the least held-out loss at that time counts, the time for the other three does not.
*equal time*: AdamW had as long as the method of the package needed (of several, the slowest; at most the seconds that it was
given in all: where these were fewer, and it had not stopped to improve, the table says *less*). Where networks were stopped
early, the closed form counts as it would be returned after each step. *ever*: the best on held-out data that it reached at all.
*under_trained*: stopped early; *noise*, *blur*, *contrast*, *jpeg*: shifted images; *missing_class*: one class was absent in
training; *pruned*: 70 % of the weights, which stay zero; *four_bit*: weights rounded, then free; *label_noise*: a fifth of the
repair labels wrong, those kept aside included. ResNet-20's weights are the published ones, which saw these
training images (without noise) before; what it lacks is made by one more epoch without the class.
"""


def chosen(outcome: Outcome, seconds: float = float("inf")) -> dict[str, Any]:
    """The point of a run that its user would keep after a time: the best on held-out data, the start if none is better.

    A new last layer has another scale of logits, and new statistics have no choice: they count as they are. The closed form
    has chosen by itself what it returns.
    """
    curves: dict[str, Curve] = outcome.result["curves"]
    if outcome.settings["method"] in ("last_layer", "batch_norm", "closed_form"):
        (curve,) = curves.values()
        return curve[-1]
    return min(
        (best([outcome.result["start"], *curve], seconds) for curve in curves.values()),
        key=lambda point: point["held_out"]["loss"],
    )


def end(outcome: Outcome) -> float:
    """When a run was over."""
    return float(max(curve[-1]["seconds"] for curve in outcome.result["curves"].values()))


def given(outcome: Outcome) -> float:
    """The time that each learning rate of AdamW was given."""
    return float(outcome.settings["seconds"])


def _stopped(curve: Curve) -> bool:
    """Whether held-out loss was no better in as many points as patience lasts."""
    least = min(range(len(curve)), key=lambda i: curve[i]["held_out"]["loss"])
    return len(curve) - 1 - least >= PATIENCE


class Line:
    """All runs of one task, by method and seed."""

    def __init__(self, network: str, repair: str, samples: int, outcomes: Outcomes) -> None:
        self.network, self.repair, self.samples = network, repair, samples
        self.runs: dict[str, dict[int, Outcome]] = {}
        for outcome in outcomes:
            self.runs.setdefault(outcome.settings["method"], {})[outcome.seed] = outcome

    @property
    def own(self) -> list[str]:
        """The methods of the package that were measured."""
        return [method for method in OWN if method in self.runs]

    def seconds(self, seed: int) -> float:
        """The time of the slowest method of the package."""
        return max(end(self.runs[m][seed]) for m in self.own if seed in self.runs[m])

    def seeds(self, *methods: str) -> list[int]:
        """Those that all of the methods were run with."""
        return sorted(set.intersection(*(set(self.runs.get(method, ())) for method in methods)))

    def scores(self, method: str, equal_time: bool = False, part: str = "test") -> list[float]:
        """At the end, or in the time of ours; one a seed."""
        seeds = self.seeds(method, *self.own[:1]) if equal_time else self.seeds(method)
        limit = self.seconds if equal_time else lambda seed: float("inf")
        return [chosen(self.runs[method][seed], limit(seed))[part]["score"] for seed in seeds]

    def start(self, part: str = "test") -> float:
        outcome = next(iter(next(iter(self.runs.values())).values()))
        return float(outcome.result["start"][part]["score"])

    def gain(self, method: str) -> list[float]:
        """Over the best AdamW in the time of this method; one a seed."""
        return [
            chosen(self.runs[method][seed])["test"]["score"]
            - chosen(self.runs[ADAMW][seed], end(self.runs[method][seed]))["test"]["score"]
            for seed in self.seeds(method, ADAMW)
        ]

    def equal(self, method: str) -> bool:
        """Whether AdamW had as much time as the method took, at every learning rate, or had stopped to improve before."""
        return all(
            given(self.runs[ADAMW][seed]) >= end(self.runs[method][seed])
            or all(_stopped(curve) for curve in self.runs[ADAMW][seed].result["curves"].values())
            for seed in self.seeds(method, ADAMW)
        )

    def time_to_five_epochs(self, method: str) -> list[float]:
        """When it had AdamW's accuracy after five epochs, as a share of AdamW's time; infinite if never; one a seed."""
        shares = []
        for seed in self.seeds(method, ADAMW):
            curves = self.runs[ADAMW][seed].result["curves"].values()
            reached = [
                {**best(curve[: FIVE_EPOCHS + 1]), "seconds": curve[FIVE_EPOCHS]["seconds"]}
                for curve in curves
                if len(curve) > FIVE_EPOCHS
            ]
            if reached:
                fifth = min(reached, key=lambda point: point["held_out"]["loss"])
                (own,) = self.runs[method][seed].result["curves"].values()
                times = [p["seconds"] for p in running(own) if p["test"]["score"] >= fifth["test"]["score"]]
                shares.append(min(times, default=float("inf")) / fifth["seconds"])
        return shares


def lines(outcomes: Outcomes) -> list[Line]:
    """The tasks of which at least one method of the package was measured."""
    groups = by(outcomes, "network", "repair", "samples")
    found = [Line(task[0], task[1], task[2], group) for task, group in groups.items()]
    order = list(NETWORKS)
    return sorted(
        (line for line in found if line.own), key=lambda line: (order.index(line.network), line.repair)
    )


def section(outcomes: Outcomes) -> str:
    """The whole of it."""
    found = lines(outcomes)
    parts = [TEXT]
    for network, title in NETWORKS.items():
        here = [line for line in found if line.network == network]
        if here:
            parts += [f"### {title}\n", _accuracies(here), _comparison(here)]
            parts += [f"![Accuracy over time](pictures/repair-{network}.svg)\n"]
    parts += ["### The class that was missing\n", _missing(found)] if _missing(found) else []
    parts += [harm.section(outcomes, TITLES)]
    return "\n".join(parts)


def _accuracies(here: Sequence[Line]) -> str:
    methods = [m for m in TITLES if any(m in line.runs for line in here)]

    def cells() -> Iterator[list[str]]:
        for line in here:
            row = [line.repair, str(line.samples), f"{100 * line.start():.2f}"]
            for method in methods:
                scores = line.scores(method) if method in line.runs else []
                if method == ADAMW:
                    equal = line.scores(method, equal_time=True) if scores else []
                    row.append(Interval.of(equal).percent() if equal else "")
                row.append(Interval.of(scores).percent() if scores else "")
            yield row

    heads = [
        h for m in methods for h in (["AdamW, equal time", "AdamW, ever"] if m == ADAMW else [TITLES[m]])
    ]
    return table_of(["what", "samples", "start", *heads], cells())


def _comparison(here: Sequence[Line]) -> str:
    def cells() -> Iterator[list[str]]:
        for line in here:
            for method in line.own:
                gains, shares = line.gain(method), line.time_to_five_epochs(method)
                if not gains:
                    continue
                interval = Interval.of(gains)
                seconds = [end(outcome) for outcome in line.runs[method].values()]
                share = sorted(shares)[len(shares) // 2] if shares else float("nan")
                yield [
                    line.repair,
                    str(line.samples),
                    OWN[method],
                    str(len(gains)),
                    f"{sum(seconds) / len(seconds):.1f}",
                    "yes" if line.equal(method) else "less",
                    interval.percent(sign=True),
                    interval.verdict,
                    "never" if share == float("inf") else f"{share:.2f}",
                ]

    heads = [
        "what", "samples", "method", "seeds", "seconds", "AdamW had as many", "points over AdamW, equal time", "which is",
    ]  # fmt: skip
    return table_of([*heads, "AdamW's five-epoch accuracy after (of its time, median)"], cells())


def _missing(found: Sequence[Line]) -> str:
    rows = []
    for line in (line for line in found if line.repair == "missing_class"):
        for method in (m for m in TITLES if m in line.runs):
            changes = [
                Interval.of([s - line.start(part) for s in line.scores(method, part=part)]).percent(sign=True)
                for part in ("missing", "others")
            ]
            rows.append([NETWORKS[line.network], TITLES[method], *changes])
    return table_of(["network", "method", "points on the class", "points elsewhere"], rows) if rows else ""


def pictures(outcomes: Outcomes) -> dict[str, Figure]:
    """For each network, test accuracy over processor time, first seed; the thick lines are chosen on held-out data."""
    found: dict[str, list[Line]] = {}
    for line in lines(outcomes):
        found.setdefault(line.network, []).append(line)
    return {
        network: grid([(f"{line.repair}, {line.samples} samples", _panel(line)) for line in here])
        for network, here in found.items()
    }


def _panel(line: Line) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for method in (m for m in (*OWN, ADAMW) if 0 in line.runs.get(m, {})):
            for rate, curve in line.runs[method][0].result["curves"].items():
                at = [point["seconds"] for point in running(curve)]
                score = [100 * point["test"]["score"] for point in running(curve)]
                if method == ADAMW:
                    axis.plot(at, score, linewidth=0.8, linestyle="--", label=f"AdamW {rate}")
                else:
                    axis.plot(
                        at, score, marker="o", markersize=3, linewidth=1.8, label=TITLES[method].strip("`")
                    )
        axis.axhline(100 * line.start(), color="grey", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("seconds")
        axis.legend(fontsize=5)

    return draw
