"""The suites: ratios of times or of memory, measured side by side. Each is run anew, and its result is a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks import (
    consistency,
    convolution,
    damage,
    device,
    grid,
    memory,
    reconstruction,
    regions,
    rules,
    scaling,
    schedules,
    solvers,
    sums,
    sweep,
)
from benchmarks.measure import Ratio, environment, quickly
from benchmarks.studies.frame import write_json

FOLDER = "suites"


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        run: measures, one ratio after the other.
        quick: how many of the first ratios are its quick form.
        device: whether it measures a CUDA device.
        cases: what measures each of its ratios, by name, where that takes long: each is kept as it is done, and not done again.
    """

    run: Callable[[], Iterable[Ratio]]
    quick: int
    device: bool = False
    cases: Callable[[], Mapping[str, Callable[[], Ratio]]] | None = None


SUITES = {
    "convolution": Suite(convolution.run, 2),
    "solvers": Suite(solvers.run, 3),
    "grid": Suite(grid.run, 1, cases=grid.cases),
    "reconstruction": Suite(reconstruction.run, 2),
    "rules": Suite(rules.run, 10),
    "sums": Suite(sums.run, 1),
    "sweep": Suite(sweep.run, 2),
    "memory": Suite(memory.run, 0),  # it needs many samples
    "regions": Suite(regions.run, 1),
    "scaling": Suite(scaling.run, 0),  # so does it
    "schedules": Suite(schedules.run, 2),
    "consistency": Suite(consistency.run, 2),
    "damage": Suite(damage.run, 1),
    "device": Suite(device.run, 0, device=True),
}


def measured(name: str, folder: Path, quick: bool) -> list[Ratio]:
    """Runs a suite, and writes what it measured."""
    suite, began, file = SUITES[name], time.process_time(), folder / FOLDER / f"{name}.json"
    if suite.cases is not None and not quick:
        return _resumed(suite.cases(), file)
    with quickly(quick):
        ratios = list(islice(suite.run(), suite.quick if quick else None))
    _write(file, ratios, time.process_time() - began, suite.device)
    return ratios


def _resumed(cases: Mapping[str, Callable[[], Ratio]], file: Path) -> list[Ratio]:
    """Measures the cases that the file does not have yet, in the same environment, and keeps each as it is done."""
    content = json.loads(file.read_text()) if file.exists() else {}
    kept = content.get("ratios", []) if content.get("environment") == environment() else []
    found = {r["what"]: Ratio(**r) for r in kept}
    seconds = content.get("seconds", 0.0) if kept else 0.0
    for what, measure in cases.items():
        if what not in found:
            began = time.process_time()
            found[what] = measure()
            seconds += time.process_time() - began
            _write(file, [found[own] for own in cases if own in found], seconds)
    return [found[what] for what in cases]


def _write(file: Path, ratios: list[Ratio], seconds: float, device: bool = False) -> None:
    content = {
        "environment": environment(device),
        "seconds": seconds,
        "ratios": [ratio.to_dict() for ratio in ratios],
    }
    write_json(file, content)
