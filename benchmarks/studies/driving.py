"""Driving: a network meets another camera, or one of its modules is damaged; which module is it, and what repairs it?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import fxinvert
from benchmarks.studies import baselines, driving_page, ours
from benchmarks.studies.curve import Curve, follow
from benchmarks.studies.frame import Run, Study
from benchmarks.studies.tasks import HELD_OUT, Task
from fxinvert import Explanation, models
from fxinvert.models.road import Camera, drives
from fxinvert.models.samples import Samples
from fxinvert.passes.plan import Plan
from fxinvert.training import ClosedForm

OUTPUTS = ("steering", "speed")
MODULES = ("perception", "fusion", "planning")
#: the module at fault, and what happened to the camera or to its weights
FAULTS: dict[str, tuple[str, Camera]] = {
    "camera pitched": ("perception", Camera(pitch=0.16)),
    "camera turned": ("perception", Camera(yaw=0.06)),
    "camera moved": ("perception", Camera(shift=0.5)),
    "fusion damaged": ("fusion", Camera()),
    "planning damaged": ("planning", Camera()),
}
#: of a damaged module's weights, relative to their spread
DAMAGE = 0.5
SAMPLES, TESTED, EXPLAINED = 300, 500, 64
#: scenes from before the fault, whose features `explain` remembers
KNOWN = 256
SWEEPS = 3
#: processor seconds for each learning rate of AdamW
SECONDS = 2.0


def runs(seeds: int) -> Iterator[Run]:
    """Each fault with each method, and its explanation."""
    for seed in range(seeds):
        for fault in FAULTS:
            given: dict[str, Any] = {"fault": fault, "samples": SAMPLES}
            name = fault.replace(" ", "_")
            for method in (*MODULES, "everything"):
                settings = given | {"method": method, "revision": ours.REVISIONS["closed_form"]}
                yield Run(f"{name}-{method}", settings, seed, fault == "camera turned")
            if seed == 0 or FAULTS[fault][1] == Camera():  # another camera is the same for every seed
                settings = given | {"method": "explain", "known": KNOWN}
                yield Run(f"{name}-explain", settings, seed, fault == "camera turned")
            yield Run(
                f"{name}-adamw",
                given | {"method": "adamw", "seconds": SECONDS},
                seed,
                fault == "camera turned",
            )


def measure(run: Run) -> dict[str, Any]:
    """The starting model and the curves of a method, or what `explain` says of it."""
    fault, method = run.settings["fault"], run.settings["method"]
    work = task(fault, run.settings["samples"], run.seed)
    if method == "explain":
        return {"at_fault": FAULTS[fault][0], **explained(work)}
    (begun,) = follow([work.model], work.held_out, work.tests)
    return {"start": {**begun, "seconds": 0.0}, "curves": dict(_curves(method, work, run))}


def task(fault: str, samples: int, seed: int) -> Task:
    """The converged network with a fault; scenes drawn by the seed; "unshifted" are those of the camera it knew."""
    module, camera = FAULTS[fault]
    model = models.load("driving", "converged")
    if camera == Camera():
        generator = torch.Generator().manual_seed(seed)
        for weight in (p for p in model.get_submodule(module).parameters() if p.dim() > 1):
            noise = torch.randn(weight.shape, generator=generator)
            weight.data += DAMAGE * weight.data.std() * noise
    drawn = drives(samples, seed=100 + seed, camera=camera)
    rows, held = torch.arange(samples), round(HELD_OUT * samples)
    tests = {"test": drives(TESTED, seed=2, camera=camera), "unshifted": drives(TESTED, seed=2)}
    return Task(model, drawn.select(rows[held:]), drawn.select(rows[:held]), tests)


def _curves(method: str, work: Task, run: Run) -> Iterator[tuple[str, Curve]]:
    if method == "adamw":
        baselines.warm_up(work.model, work.train)
        for rate in baselines.LEARNING_RATES:
            found = baselines.adamw(work.model, work.train, rate, run.seed)
            yield f"{rate:g}", follow(found, work.held_out, work.tests, SECONDS)
    else:
        ours.warm_up()
        names = [segment.name for segment in _plan(work).segments]
        only = [name for name in names if method in (module_of(name), "everything")]
        found = ours.sweeping(work, ClosedForm(), SWEEPS, only=only, output=OUTPUTS)
        yield method, follow(found, work.held_out, work.tests)


def _plan(work: Task) -> Plan:
    example = tuple(values[:2] for values in work.train.inputs)
    return fxinvert.partition(fxinvert.trace(work.model, example, output=OUTPUTS))


def module_of(segment: str) -> str:
    """The module that a segment belongs to: the first part of its name."""
    return segment.split(".")[0]


def explained(work: Task) -> dict[str, Any]:
    """What `explain` says of test scenes, for each module.

    The mean part of the joint correction, how far its output would have to move, and how far what it computed departs from
    what it computed for other scenes before the fault: ‖difference of the means‖ / ‖standard deviation‖.
    """
    found = _explanation(work.model, work.tests["test"].select(torch.arange(EXPLAINED)))
    now = _explanation(work.model, work.tests["test"].select(torch.arange(KNOWN)))
    before = _explanation(models.load("driving", "converged"), drives(KNOWN, seed=7))
    parts, moved, departs = (dict[str, float]() for _ in range(3))
    for cut, after, known in zip(found.cuts, now.cuts, before.cuts, strict=True):
        module = module_of(cut.segment)
        parts[module] = parts.get(module, 0.0) + float(cut.part.mean())
        moved[module] = max(moved.get(module, 0.0), float(cut.moved.mean()))
        departure = (after.anchor.mean(0) - known.anchor.mean(0)).norm() / known.anchor.std(0).norm()
        departs[module] = max(departs.get(module, 0.0), float(departure))
    return {"parts": parts, "moved": moved, "departs": departs}


def _explanation(model: nn.Module, scenes: Samples) -> Explanation:
    return fxinvert.explain(model, scenes.inputs, scenes.labels, output=OUTPUTS)


STUDY = Study("driving", 2, runs, measure, driving_page.section, driving_page.pictures)
