"""The frame of all studies: runs are declared as a table, each is measured once, and its result is a file.

A file is written whole or not at all, and knows the settings it was measured with: what is done is not done again, what
was measured with other settings is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import environment
from fxinvert.errors import FxInvertError
from fxinvert.scheduling.keys import content_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: decimals that are kept of measured numbers
DIGITS = 6


@dataclass(frozen=True)
class Run:
    """One line of a study's table.

    Attributes:
        name: of the run; with the seed, the name of its file.
        settings: everything that decides the result, JSON-ready.
        seed: of the run.
        quick: whether it belongs to the quick form.
        needs: the library without which it is left out, besides those that all runs need.
    """

    name: str
    settings: Mapping[str, Any]
    seed: int = 0
    quick: bool = False
    needs: str = ""

    @property
    def file(self) -> str:
        return f"{self.name}-{self.seed}.json"


@dataclass(frozen=True)
class Outcome:
    """What was measured in a run.

    Attributes:
        run, settings, seed: of the run.
        key: of everything the result depends on.
        seconds: processor time in all.
        environment: what else figures depend on.
        result: what the study measured.
    """

    run: str
    settings: dict[str, Any]
    seed: int
    key: str
    seconds: float
    environment: dict[str, str]
    result: dict[str, Any]


Outcomes = Sequence[Outcome]


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: of the study and of its folder.
        version: raised whenever what its runs do changes; results of other versions are measured anew.
        runs: its table, for a number of seeds.
        measure: does a run; the result is JSON-ready.
        section: its part of the results page, in Markdown.
        pictures: its plots, by name; None: it has none.
    """

    name: str
    version: int
    runs: Callable[[int], Iterable[Run]]
    measure: Callable[[Run], dict[str, Any]]
    section: Callable[[Outcomes], str]
    pictures: Callable[[Outcomes], Mapping[str, Figure]] | None = None

    def key(self, settings: Mapping[str, Any], seed: int) -> str:
        """Of a run's result; of settings as they are written."""
        return content_key(self.name, self.version, rounded(settings), seed)


def table(study: Study, seeds: int, quick: bool) -> list[Run]:
    """The runs of a study that can be done here: those of the first seed first."""
    runs = sorted(study.runs(1 if quick else seeds), key=lambda run: run.seed)
    return [run for run in runs if (run.quick or not quick) and not is_missing(run.needs)]


def is_missing(library: str) -> bool:
    """Whether a library is not installed."""
    return library != "" and importlib.util.find_spec(library) is None


def perform(
    study: Study, folder: Path, runs: Sequence[Run], workers: int = 1, fresh: bool = False
) -> Iterator[tuple[Run, Outcome | FxInvertError]]:
    """Does the runs that are not done yet, and writes what they gave; a run that fails does not stop the others.

    Args:
        study: the study.
        folder: of all results.
        runs: lines of its table.
        workers: processes; each computes with one thread.
        fresh: whether to do again what is done.
    """
    missing = [run for run in runs if fresh or _known(study, folder, run) is None]
    if workers == 1:
        for run in missing:
            yield run, _perform(study, folder, run)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found = [(run, pool.submit(_perform, study, folder, run)) for run in missing]
        for run, future in found:
            yield run, future.result()


def outcomes(study: Study, folder: Path) -> list[Outcome]:
    """Everything that was measured with this version of the study, in the order of the files' names."""
    found = [_read(file) for file in sorted((folder / study.name).glob("*.json"))]
    return [outcome for outcome in found if outcome.key == study.key(outcome.settings, outcome.seed)]


def write_json(file: Path, content: Any) -> None:
    """Writes a file whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(rounded(content), indent=1, sort_keys=True) + "\n")
    partial.replace(file)


def rounded(content: Any) -> Any:
    """The same content, its numbers with a few decimals only."""
    match content:
        case float():
            return round(content, DIGITS)
        case Mapping():
            return {key: rounded(value) for key, value in content.items()}
        case list() | tuple():
            return [rounded(value) for value in content]
        case _:
            return content


def by(outcomes: Iterable[Outcome], *settings: str) -> dict[tuple[Any, ...], list[Outcome]]:
    """Outcomes in groups of equal settings, in the order in which these occur."""
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(outcome.settings.get(name) for name in settings), []).append(outcome)
    return groups


def _known(study: Study, folder: Path, run: Run) -> Outcome | None:
    file = folder / study.name / run.file
    outcome = _read(file) if file.exists() else None
    return outcome if outcome and outcome.key == study.key(run.settings, run.seed) else None


def _perform(study: Study, folder: Path, run: Run) -> Outcome | FxInvertError:
    torch.set_num_threads(1)
    began = time.process_time()
    try:
        result = study.measure(run)
    except FxInvertError as error:
        return error
    outcome = Outcome(
        run=run.name,
        settings=dict(run.settings),
        seed=run.seed,
        key=study.key(run.settings, run.seed),
        seconds=time.process_time() - began,
        environment=environment(),
        result=result,
    )
    write_json(folder / study.name / run.file, asdict(outcome))
    return outcome


def _read(file: Path) -> Outcome:
    return Outcome(**json.loads(file.read_text()))
