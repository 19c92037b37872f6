"""What the study of the paper's protocol says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.curve import best
from benchmarks.studies.frame import Outcome, Outcomes, by
from benchmarks.studies.pages import grid, table_of
from benchmarks.studies.statistics import Interval

#: points over α = 0 at the paper's best layer and α, both found on its test set: epoch 5, mean, best epoch
PUBLISHED = {
    "mnist_cnn": (0.0007, 0.0006, 0.0004),
    "cifar_cnn": (0.0081, 0.0074, 0.0048),
    "resnet20": (0.0026, 0.0020, 0.0020),
}
TITLES = {
    "mnist_cnn": "MNIST, SimpleCNN",
    "cifar_cnn": "CIFAR-10, SimpleCNN",
    "resnet20": "CIFAR-10, ResNet-20 (the paper: ResNet-18)",
}
METHODS = {
    "closed_form": "closed form, parallel",
    "gradient": "gradient, each segment alone",
    "auto": '`method="auto"`, one sweep',
}
#: samples that the CIFAR-10 network was trained on
WHOLE = 15_000
#: of the protocol; α = 0 may go on, to be compared with methods that pass over the data more often
EPOCHS = 10

TEXT = """\
## The paper's protocol

FR-PT (arXiv 2506.07188): everything up to a cut is trained on cross-entropy plus w times the squared distance to the
reconstructed features; α sets w, α = 0 is fine-tuning of the same layers. AdamW 5e-5, weight decay 0.05, batch 256, 10
epochs. Unlike there, the CIFAR-10 network was pretrained on 15,000 images only, samples are a part of the training data where
they are fewer (see the tables), and α and cut are chosen by held-out accuracy after epoch 5, mean over seeds, never on test
data. Gains are paired: the same seed, the same order of samples. Every time a method of the package reads the samples counts
as a pass, with gradients or without, for whatever it tries and does not take. α = 0 has as many, at the cut and the epoch
that are best on held-out data; its learning rate is the protocol's, `method="auto"` chooses its own on held-out data.
"""


def section(outcomes: Outcomes) -> str:
    """The whole of it."""
    parts = [TEXT]
    for (network, samples), group in by(outcomes, "network", "samples").items():
        start = group[0].result["start"]
        seeds = sorted({outcome.seed for outcome in group})
        joint = by((o for o in group if o.settings["method"] == "joint"), "cut", "alpha")
        parts += [
            f"### {TITLES[network]}, {samples:,} samples\n",
            f"{len(seeds)} seed(s); the starting model's accuracy: {100 * start['test']['score']:.2f} %.\n",
            table_of(["cut after", "α", "seeds", *HEADS], _gains(joint)),
            _verdict(network, joint),
        ]
        own = by((o for o in group if o.settings["method"] != "joint"), "method")
        if own:
            parts += [table_of(OWN_HEADS, _own(own, joint))]
        parts += [f"![Accuracy over epochs](pictures/paper-{network}-{samples}.svg)\n"]
    return "\n".join(parts)


HEADS = ["after epoch 5, points over α = 0", "mean of epochs", "best epoch", "held-out, after epoch 5"]
OWN_HEADS = [
    "method", "seeds", "seconds", "passes", "test accuracy",
    "points over the start", "points over α = 0 at as many passes", "in as much time",
]  # fmt: skip


def _summaries(outcome: Outcome, part: str = "test") -> tuple[float, float, float]:
    scores = [point[part]["score"] for point in outcome.result["curve"][:EPOCHS]]
    return scores[4], fmean(scores), max(scores)


Joint = dict[tuple[Any, ...], list[Outcome]]


def _paired(joint: Joint, cut: str, alpha: float, part: str = "test") -> list[tuple[float, ...]]:
    """Differences from α = 0 at the same cut, one a seed."""
    plain = {o.seed: _summaries(o, part) for o in joint.get((cut, 0.0), [])}
    return [
        tuple(a - b for a, b in zip(_summaries(o, part), plain[o.seed], strict=True))
        for o in joint[cut, alpha]
        if o.seed in plain
    ]


def _gains(joint: Joint) -> Iterator[list[str]]:
    for cut, alpha in joint:
        if alpha == 0:
            absolute = [_summaries(o) for o in joint[cut, alpha]]
            cells = [f"({100 * fmean(values):.2f} %)" for values in zip(*absolute, strict=True)]
            held = [f"({100 * fmean(_summaries(o, 'held_out')[0] for o in joint[cut, alpha]):.2f} %)"]
        elif paired := _paired(joint, cut, alpha):
            cells = [
                Interval.of(values).percent(sign=True) for values in map(list, zip(*paired, strict=True))
            ]
            held = [Interval.of([p[0] for p in _paired(joint, cut, alpha, "held_out")]).percent(sign=True)]
        else:
            continue
        yield [f"`{cut}`", f"{alpha:g}", str(len(joint[cut, alpha])), *cells, *held]


def chosen_gain(joint: Joint) -> tuple[str, float, list[Interval]] | None:
    """The cut and α that are best on held-out data, and their gains on test data; None: nothing was measured."""
    tried = [
        (fmean(p[0] for p in paired), cut, alpha)
        for cut, alpha in joint
        if alpha and (paired := _paired(joint, cut, alpha, "held_out"))
    ]
    if not tried:
        return None
    _, cut, alpha = max(tried)
    return cut, alpha, [Interval.of(values) for values in zip(*_paired(joint, cut, alpha), strict=True)]


def reached(network: str, intervals: Sequence[Interval]) -> list[bool] | None:
    """Of epoch 5, mean and best epoch: whether there is a gain, and the paper's is within its interval or below.

    None: with one seed there is no interval.
    """
    if intervals[0].count < 2:
        return None
    return [
        interval.verdict == "better" and interval.mean + interval.half >= gain
        for interval, gain in zip(intervals, PUBLISHED[network], strict=True)
    ]


def _verdict(network: str, joint: Joint) -> str:
    """What the choice on held-out data gives on test data."""
    found = chosen_gain(joint)
    if found is None:
        return ""
    cut, alpha, intervals = found
    hits = reached(network, intervals)
    verdict = (
        "open with one seed" if hits is None
        else "reproduced" if all(hits)
        else "reproduced in part" if any(hits)
        else "not reproduced"
    )  # fmt: skip
    gains = " / ".join(interval.percent(sign=True) for interval in intervals)
    theirs = " / ".join(f"{100 * gain:+.2f}" for gain in PUBLISHED[network])
    return (
        f"Chosen on held-out data: cut after `{cut}`, α = {alpha:g}. Its gain over α = 0 on test data (epoch 5 / mean / best "
        f"epoch): {gains} points; the paper reports {theirs}. **The gain is {verdict}** (it is, where the interval is above 0 "
        "and reaches the paper's).\n"
    )


def gains_at_equal_passes(found: Outcomes, joint: Joint) -> list[float]:
    """Over fine-tuning after as many passes over the data; one a seed."""
    gains = []
    for outcome in found:
        passes = math.ceil(passes_of(outcome))
        plain = [o for o in _plain(joint, outcome.seed) if len(o.result["curve"]) >= passes]
        if plain:
            gains.append(_kept(outcome) - _chosen(plain, passes, float("inf")))
    return gains


def _gains_in_equal_time(found: Outcomes, joint: Joint) -> list[float]:
    pairs = [(o, _plain(joint, o.seed), o.result["curve"][-1]["seconds"]) for o in found]
    return [_kept(outcome) - _chosen(plain, None, seconds) for outcome, plain, seconds in pairs if plain]


def _plain(joint: Joint, seed: int) -> list[Outcome]:
    """Fine-tuning at every cut."""
    return [o for (_, alpha), found in joint.items() if alpha == 0 for o in found if o.seed == seed]


def _kept(outcome: Outcome) -> float:
    """Test accuracy of the model that was best on held-out data, the start included."""
    return float(best([outcome.result["start"], *outcome.result["curve"]])["test"]["score"])


def _own(own: dict[tuple[Any, ...], list[Outcome]], joint: Joint) -> Iterator[list[str]]:
    for (method,), found in own.items():
        scores = [_kept(o) for o in found]
        starts = [o.result["start"]["test"]["score"] for o in found]
        comparisons = gains_at_equal_passes(found, joint), _gains_in_equal_time(found, joint)
        yield [
            METHODS[method],
            str(len(found)),
            f"{fmean(o.result['curve'][-1]['seconds'] for o in found):.1f}",
            f"{fmean(map(passes_of, found)):.3g}",
            Interval.of(scores).percent(),
            Interval.of([a - b for a, b in zip(scores, starts, strict=True)]).percent(sign=True),
            *(Interval.of(values).percent(sign=True) if values else "" for values in comparisons),
        ]


def passes_of(outcome: Outcome) -> float:
    """Over the training data: three output targets are tried in the first sweep; each segment has three epochs."""
    if "passes" in outcome.result:
        return float(outcome.result["passes"])
    return len(outcome.result["curve"]) + 2 if outcome.settings["method"] == "closed_form" else 3


def _chosen(plain: Sequence[Outcome], epochs: int | None, seconds: float) -> float:
    """Test accuracy of fine-tuning at its best cut and epoch within a limit, chosen by held-out loss."""
    points = [point for o in plain for point in [o.result["start"], *o.result["curve"][:epochs]]]
    return float(best(points, seconds)["test"]["score"])


def pictures(outcomes: Outcomes) -> dict[str, Figure]:
    """Mean test accuracy over epochs, a panel for each cut."""
    figures = {}
    for (network, samples), group in by(outcomes, "network", "samples").items():
        joint = by((o for o in group if o.settings["method"] == "joint"), "cut", "alpha")
        cuts = list(dict.fromkeys(cut for cut, _ in joint))
        if cuts:
            figures[f"{network}-{samples}"] = grid(
                [(f"cut after {cut}", _panel(joint, cut)) for cut in cuts], columns=2
            )
    return figures


def _panel(joint: Joint, cut: str) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for alpha in (alpha for c, alpha in joint if c == cut):
            curves = [[p["test"]["score"] for p in o.result["curve"]] for o in joint[cut, alpha]]
            means = [100 * fmean(values) for values in zip(*curves, strict=True)]
            axis.plot(range(1, len(means) + 1), means, marker="o", markersize=2, label=f"α = {alpha:g}")
        start = next(iter(joint.values()))[0].result["start"]
        axis.axhline(100 * start["test"]["score"], color="grey", linewidth=0.8)
        axis.set_xlabel("epoch")
        axis.legend(fontsize=6)

    return draw
