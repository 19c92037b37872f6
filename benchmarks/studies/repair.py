"""Repair: what users need, against what they do today, on equal data and in equal time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from benchmarks.studies import baselines, ours, repair_page
from benchmarks.studies.curve import Curve, Timed, follow
from benchmarks.studies.frame import Run, Study
from benchmarks.studies.tasks import HELD_OUT, Task, task
from fxinvert.training import Auto
from fxinvert.training.repeat import FEW

#: network, repair, samples to repair with, whether it belongs to the quick form
TASKS = [
    ("digits_cnn", "under_trained", 1347, True),
    *(("digits_cnn", "under_trained", count, count == 100) for count in (100, 300)),
    *(("digits_cnn", repair, 1000, repair == "pruned") for repair in ("noise", "missing_class", "pruned", "four_bit", "label_noise")),
    ("mnist_cnn", "under_trained", 1000, True),
    *(("mnist_cnn", "under_trained", count, False) for count in (100, 300, 3000)),
    *(("mnist_cnn", repair, 1000, False) for repair in ("noise", "missing_class", "pruned", "four_bit", "label_noise")),
    ("cifar_cnn", "under_trained", 1000, False),
    *(("cifar_cnn", "under_trained", count, False) for count in (100, 300)),
    *(("resnet20", repair, 500, False) for repair in ("noise", "missing_class", "pruned")),
    *(("resnet20", repair, 100, False) for repair in ("noise", "missing_class", "pruned")),
    *(("digits_resnet", "under_trained", count, False) for count in (300, 1347)),
    *(("digits_resnet", repair, 1000, False) for repair in ("noise", "missing_class", "pruned")),
    *(("cifar_cnn", repair, 1000, False) for repair in ("noise", "missing_class", "pruned", "four_bit", "label_noise")),
    *(("resnet20", repair, 500, False) for repair in ("blur", "contrast", "jpeg", "four_bit")),
]  # fmt: skip

#: networks that branch have batch norms, too
RESIDUAL = ("digits_resnet", "resnet20")
#: processor seconds that each learning rate of AdamW gets, at least and for every sample: as many as `auto` takes, which
#: repeats what it does with few
SECONDS = {
    "digits_cnn": (3.0, 0.0),
    "digits_resnet": (6.0, 0.002),
    "mnist_cnn": (4.0, 0.0028),
    "cifar_cnn": (7.0, 0.001),
    "resnet20": (20.0, 0.08),
}
#: where `auto` takes longer, with one seed at least
LONGER = {
    ("mnist_cnn", "under_trained", 3000): 18.0,
    **{("digits_cnn", repair, 1000): 9.0 for repair in ("four_bit", "noise", "pruned")},
    **{("mnist_cnn", repair, 1000): 16.0 for repair in ("four_bit", "label_noise", "missing_class")},
    **{
        ("cifar_cnn", repair, 1000): 25.0
        for repair in ("four_bit", "label_noise", "missing_class", "under_trained")
    },
    **{("resnet20", repair, 500): 180.0 for repair in ("four_bit", "jpeg")},
    ("resnet20", "missing_class", 500): 220.0,
}


def runs(seeds: int) -> Iterator[Run]:
    """For each task every method; a method of the package knows its revision."""
    for seed in range(seeds):
        for network, repair, samples, quick in TASKS:
            own = "recursive" if network in RESIDUAL else "closed_form"
            training = round((1 - HELD_OUT) * samples)
            others = ["last_layer", "batch_norm"] if network in RESIDUAL else ["last_layer"]
            least, each = SECONDS[network]
            for method in (own, "auto", repair_page.ADAMW, *others):
                settings: dict[str, Any] = {
                    "network": network,
                    "repair": repair,
                    "samples": samples,
                    "method": method,
                }
                if method in ours.METHODS:
                    settings["revision"] = ours.revision(method, training, normalized=network in RESIDUAL)
                    if method == "closed_form":
                        settings["last_layer"] = True
                        if repair == "under_trained":
                            settings["by_steps"] = True
                elif method == repair_page.ADAMW:
                    times = 1 + Auto().folds if training in FEW else 1
                    settings["seconds"] = times * LONGER.get(
                        (network, repair, samples), least + each * samples
                    )
                else:
                    settings["held_out"] = 0.2
                yield Run(f"{network}-{repair}-{samples}-{method}", settings, seed, quick)


def measure(run: Run) -> dict[str, Any]:
    """The starting model, and the curve of the method; of AdamW one curve for each learning rate."""
    given = run.settings
    work = task(given["network"], given["repair"], given["samples"], run.seed)
    (begun,) = follow([work.model], work.held_out, work.tests)
    return {"start": {**begun, "seconds": 0.0}, "curves": dict(_curves(given, work, run.seed))}


def _curves(given: Any, work: Task, seed: int) -> Iterator[tuple[str, Curve]]:
    method = given["method"]
    if method == repair_page.ADAMW:
        baselines.warm_up(work.model, work.train)
        for rate in baselines.LEARNING_RATES:
            models = baselines.adamw(work.model, work.train, rate, seed, masks=work.masks)
            yield f"{rate:g}", follow(models, work.held_out, work.tests, given["seconds"])
    else:
        own = _models(method, work, given.get("by_steps", False))
        yield method, follow(own, work.held_out, work.tests, patience=sys.maxsize)


def _models(method: str, work: Task, by_steps: bool) -> Iterator[nn.Module | Timed]:
    match method:
        case "last_layer":
            return baselines.last_layer(work.model, work.train, work.held_out)
        case "batch_norm":
            return baselines.batch_norm(work.model, work.train)
        case _:
            ours.warm_up()
            if by_steps:
                return ours.closed_form_by_steps(work)
            return ours.METHODS[method](work)


STUDY = Study("repair", 1, runs, measure, repair_page.section, repair_page.pictures)
