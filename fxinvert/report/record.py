"""What a report tells: facts, JSON-ready, and the pictures that go with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

import fxinvert
from fxinvert.errors import FxInvertError
from fxinvert.explanation import Explanation, explain
from fxinvert.inversion.choice import reconstruction_for
from fxinvert.passes import trace
from fxinvert.passes.flow import Flow
from fxinvert.passes.outputs import Key
from fxinvert.passes.plan import Plan
from fxinvert.passes.trace import by_sample
from fxinvert.report import intervals
from fxinvert.report.answers import Answers, answers, histograms
from fxinvert.report.nodes import graph_facts
from fxinvert.report.pictures import figure_of, image_of
from fxinvert.report.samples import first, pick
from fxinvert.training import Batches
from fxinvert.training.batch import Arguments, Batch, tensors_of

#: samples that got better, and worse, that are shown
EXAMPLES = 8
#: samples that are explained with a picture, and those that mean corrections are taken over
PICTURES, EXPLAINED, LINEARIZED_EXPLAINED = 3, 64, 16
#: numbers in the output, per sample, up to which linearized targets are explained
EXPLAINED_OUTPUTS = 4096


@dataclass(frozen=True)
class Subject:
    """What is reported on.

    Attributes:
        name: of the run.
        before, after: the model as given, and as post-trained.
        data: what both are shown on.
        data_name: how it is called, "test" or "held-out".
        example: inputs to trace with.
        output: the supervised output.
        plan: the partition that was used.
        settings: of the run.
        metrics, timing: what the run has measured, see `fxinvert.report.metrics`.
        repairs: what repairing each segment alone brings, see `fxinvert.Repairs`; empty if nobody asked.
    """

    name: str
    before: nn.Module
    after: nn.Module
    data: Batches
    data_name: str
    example: Arguments
    output: Key | None
    plan: Plan
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    timing: Mapping[str, Any]
    repairs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Facts, and pictures by name: `sample 7` is a small image, `explain 7` a figure."""

    facts: dict[str, Any]
    pictures: dict[str, str] = field(default_factory=dict)


def build(subject: Subject) -> Report:
    """Everything that a report tells of a run.

    Raises:
        FxInvertError: the models cannot be traced, or the data do not fit.
    """
    graph, updated = (
        by_sample(trace(model, subject.example, output=subject.output), subject.example)
        for model in (subject.before, subject.after)
    )
    before, after = (answers(g, subject.data) for g in (graph, updated))
    pictures: dict[str, str] = {}
    facts = {
        "fxinvert": fxinvert.__version__,
        "run": subject.name,
        "model": type(subject.before).__name__,
        "parameters": sum(p.numel() for p in subject.before.parameters()),
        "settings": dict(subject.settings),
        "headline": _headline(subject, before, after),
        "metrics": subject.metrics.get("metrics", {}),
        "notes": [*subject.metrics.get("warnings", []), *_training(subject).get("notes", [])],
        "segments": _segments(subject),
        "updates": _updates(subject),
        "graph": graph_facts(graph, first(subject.data, EXPLAINED), _target(before)),
        "outputs": _outputs(before, after),
        "samples": _samples(subject.data, before, after, pictures),
        "explain": _explained(subject, graph, before, pictures),
        "repairs": dict(subject.repairs),
    }
    return Report(facts, pictures)


def _training(subject: Subject) -> Mapping[str, Any]:
    found: Mapping[str, Any] = subject.metrics.get("post_training", {})
    return found


def _headline(subject: Subject, before: Answers, after: Answers) -> dict[str, Any]:
    """The figure that people ask for, before and after, with how sure it is."""
    name, values = "loss", [before.losses, after.losses]
    estimate: Callable[[Tensor], intervals.Estimate] = intervals.mean
    if before.hits is not None and after.hits is not None:
        name, values, estimate = "accuracy", [before.hits, after.hits], intervals.share
    return {
        "metric": name,
        "data": subject.data_name,
        "samples": len(before.losses),
        "before": estimate(values[0]).to_dict(),
        "after": estimate(values[1]).to_dict(),
        "change": intervals.mean(values[1] - values[0]).to_dict(),
    }


def _segments(subject: Subject) -> list[dict[str, Any]]:
    """The plan's segments, and what became of each."""
    found, updates = [], _updates(subject)
    for number, segment in enumerate(subject.plan.segments, 1):
        own = [u for u in updates if segment.name in u["segments"] and u["kept"]]
        found.append(
            {
                "number": number,
                "name": segment.name,
                "from": segment.entry,
                "to": segment.exit,
                "shape": [list(segment.in_shape), list(segment.out_shape)],
                "trained": list(segment.trained),
                "parameters": segment.parameter_count,
                "cost": segment.cost,
                "updates": len(own),
                "taken": sum(update["step"] > 0 for update in own),
                "gain": _gain(own),
                "seconds": sum(update["seconds"] or 0.0 for update in own),
            }
        )
    return found


def _gain(updates: Sequence[Mapping[str, Any]]) -> float:
    """By how much the loss fell from the first to the last update of each wave; what was gone back from does not count."""
    ends: dict[Any, tuple[float, float]] = {}
    for update in updates:
        wave = update["sweep"], *update["segments"]
        before, _ = ends.get(wave, (update["loss_before"], 0.0))
        ends[wave] = before, update["loss_after"]
    return sum(before - after for before, after in ends.values())


def _updates(subject: Subject) -> list[dict[str, Any]]:
    """Every update that was tried; `kept` are those with the output target that was gone on with."""
    method = str(subject.settings.get("method", "closed_form"))
    chosen = _training(subject).get("output_target")
    seconds = [update.get("seconds") for update in subject.timing.get("updates", [])]
    history = _training(subject).get("history", [])
    parameters = {segment.name: segment.parameter_count for segment in subject.plan.segments}
    ops = {op for segment in subject.plan.segments for op in segment.trained}

    def means(record: Mapping[str, Any]) -> str:
        """What the automatic method has tried: its gradient runs are named in place of ops."""
        named = next((name for name in record["explained"] if name not in ops), "closed_form")
        return named if method == "auto" else method

    return [
        {
            "sweep": record["sweep"],
            "segments": list(record["segments"]),
            "parameters": sum(parameters.get(name, 0) for name in record["segments"]),
            "method": means(record),
            "output_target": record["output_target"],
            "kept": record["output_target"] == chosen,
            "explained": {k: v for k, v in record["explained"].items() if k in ops or method != "auto"},
            "sizes": dict(record["sizes"]),
            "damping": dict(record["damping"]),
            "step": record["step"],
            "loss_before": record["before"]["loss"],
            "loss_after": record["after"]["loss"],
            "accuracy_after": record["after"]["accuracy"],
            "seconds": seconds[i] if i < len(seconds) else None,
        }
        for i, record in enumerate(history)
    ]


def _outputs(before: Answers, after: Answers) -> list[dict[str, Any]]:
    """For every output, its confusion matrix or the histogram of its errors, before and after."""
    found: list[dict[str, Any]] = []
    for old, new in zip(before.heads, after.heads, strict=True):
        facts: dict[str, Any] = {"name": old.name, "classes": old.classes}
        if not old.classes:
            facts["errors"] = histograms(old, new)
        elif (counts := old.confusion()) is not None:
            facts["confusion"] = {"before": counts, "after": new.confusion()}
        found.append(facts)
    return found


def _samples(data: Batches, before: Answers, after: Answers, pictures: dict[str, str]) -> dict[str, Any]:
    """How many samples turned right and wrong, and those whose loss fell, and rose, the most."""
    gain = before.losses - after.losses
    facts: dict[str, Any] = {"loss_fell": int((gain > 0).sum()), "loss_rose": int((gain < 0).sum())}
    if before.hits is not None and after.hits is not None:
        was, now = before.hits == 1, after.hits == 1
        facts |= {
            "right_before_and_after": int((was & now).sum()),
            "turned_right": int((~was & now).sum()),
            "turned_wrong": int((was & ~now).sum()),
            "wrong_before_and_after": int((~was & ~now).sum()),
        }
    order = gain.argsort(descending=True, stable=True).tolist()
    better = [i for i in order if gain[i] > 0][:EXAMPLES]
    worse = [i for i in order[::-1] if gain[i] < 0][:EXAMPLES]
    shown = [*better, *worse]
    if shown:
        inputs = tensors_of(pick(data, shown).inputs)
        for place, number in enumerate(shown):
            image = next(filter(None, (image_of(value[place]) for value in inputs)), None)
            if image is not None:
                pictures[f"sample {number}"] = image
    words = (before.labels, before.given, after.given)

    def told(number: int) -> dict[str, Any]:
        label, old, new = (texts[number] for texts in words)
        losses = {"loss_before": float(before.losses[number]), "loss_after": float(after.losses[number])}
        return {"sample": number, "label": label, "before": old, "after": new} | losses

    return facts | {"better": list(map(told, better)), "worse": list(map(told, worse))}


def _explained(
    subject: Subject, graph: fx.GraphModule, before: Answers, pictures: dict[str, str]
) -> dict[str, Any]:
    """Where the model as given went wrong: the samples with the largest losses, and means by class."""
    worst = before.losses.argsort(descending=True, stable=True)[:PICTURES].tolist()

    def found(batch: Batch) -> Explanation:
        return explain(graph, batch.inputs, batch.labels, plan=subject.plan)

    try:
        linearized = reconstruction_for(graph) == "linearized"
        size = Flow(graph).size
        if linearized and size > EXPLAINED_OUTPUTS:
            return {
                "problem": f"not explained: targets are linearized, the output has {size} numbers per sample"
            }
        shown = found(pick(subject.data, worst))
        means = found(first(subject.data, LINEARIZED_EXPLAINED if linearized else EXPLAINED))
    except FxInvertError as error:
        return {"problem": str(error)}
    for place, number in enumerate(worst):
        pictures[f"explain {number}"] = figure_of(shown.figure(place, number))
    return {
        "problem": "",
        "output_target": shown.kind,
        "samples": worst,
        "shares": [
            {cut.segment: float(cut.share[place]) for cut in shown.cuts} for place in range(len(worst))
        ],
        "mean_over": len(means),
        "by_class": means.by_class(),
    }


def _target(found: Answers) -> str:
    return "margin" if any(head.classes for head in found.heads) else "regression"
