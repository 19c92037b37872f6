"""The suites: ratios of times or of memory, measured side by side. Each is run anew, and its result is a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks import (
    consistency,
    convolution,
    damage,
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
    """

    run: Callable[[], Iterable[Ratio]]
    quick: int


SUITES = {
    "convolution": Suite(convolution.run, 2),
    "solvers": Suite(solvers.run, 3),
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
}


def measured(name: str, folder: Path, quick: bool) -> list[Ratio]:
    """Runs a suite, and writes what it measured."""
    suite, began = SUITES[name], time.process_time()
    with quickly(quick):
        ratios = list(islice(suite.run(), suite.quick if quick else None))
    content = {
        "environment": environment(),
        "seconds": time.process_time() - began,
        "ratios": [ratio.to_dict() for ratio in ratios],
    }
    write_json(folder / FOLDER / f"{name}.json", content)
    return ratios
