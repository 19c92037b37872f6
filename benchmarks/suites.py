"""The suites: ratios of times or of memory, measured side by side. Each is run anew, and its result is a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import (
    consistency,
    convolution,
    memory,
    reconstruction,
    regions,
    rules,
    scaling,
    solvers,
    sweep,
)
from benchmarks.measure import Ratio, environment
from benchmarks.studies.frame import write_json

FOLDER = "suites"


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        run: measures.
        quick: its quick form; None: it has none.
    """

    run: Callable[[], Iterable[Ratio]]
    quick: Callable[[], Iterable[Ratio]] | None = None


SUITES = {
    "convolution": Suite(convolution.run),
    "solvers": Suite(solvers.run),
    "reconstruction": Suite(reconstruction.run, reconstruction.run),
    "rules": Suite(rules.run),
    "sweep": Suite(sweep.run, lambda: sweep.run(samples=512)),
    "memory": Suite(memory.run),
    "regions": Suite(regions.run),
    "consistency": Suite(consistency.run),
    "scaling": Suite(scaling.run, lambda: scaling.run(samples=1000, rounds=1)),
}


def measured(name: str, folder: Path, quick: bool) -> list[Ratio]:
    """Runs a suite, and writes what it measured."""
    suite = SUITES[name]
    began = time.process_time()
    run = suite.quick if quick else suite.run
    ratios = [] if run is None else list(run())
    content = {
        "environment": environment(),
        "seconds": time.process_time() - began,
        "ratios": [ratio.to_dict() for ratio in ratios],
    }
    write_json(folder / FOLDER / f"{name}.json", content)
    return ratios
