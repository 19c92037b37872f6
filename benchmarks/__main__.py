"""`python -m benchmarks`: measure what is claimed, and renew the page that claims it.

```
python -m benchmarks all --quick        # everything, in its quick form
python -m benchmarks all                # everything; what is done already is not done again
python -m benchmarks suite solvers      # ratios of times, side by side
python -m benchmarks study repair --seeds 5
python -m benchmarks document           # docs/results.md from the files alone
```
"""

from __future__ import annotations

import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads measure the neighbours

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import document
from benchmarks.studies import STUDIES
from benchmarks.studies.frame import is_missing, perform, table
from benchmarks.suites import SUITES, measured
from fxinvert.errors import FxInvertError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

RESULTS = Path(__file__).parent / "results"
#: results of quick forms are no results: they show that everything runs
QUICK = Path("build") / "benchmarks"

Names = Annotated[list[str] | None, typer.Argument(help="Which; by default all.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small part, written to build/benchmarks.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds of each run.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")]
Only = Annotated[str, typer.Option(help="Only runs whose name matches this regular expression.")]


@app.command("all")
def everything(quick: Quick = False, seeds: Seeds = 5, workers: Workers = 1) -> None:
    """All suites and studies, and the page."""
    suite(None, quick)
    try:
        study(None, quick, seeds, workers)
    finally:
        document_page(quick)


@app.command()
def suite(names: Names = None, quick: Quick = False) -> None:
    """Ratios of times and of memory, measured side by side."""
    for name in _known(names, SUITES):
        if quick and not SUITES[name].quick:
            continue
        if SUITES[name].device and not torch.cuda.is_available():
            console.print(f"{name} was left out: there is no CUDA device", style="yellow")
            continue
        shown = Table("what", "compared with", "ratio", "aim", "note", title=name)
        for r in measured(name, _folder(quick), quick):
            shown.add_row(r.what, r.compared_with, f"{r.ratio:.2g}", f"{r.aim:g}" if r.aim else "", r.note)
        console.print(shown)


@app.command()
def study(
    names: Names = None, quick: Quick = False, seeds: Seeds = 5, workers: Workers = 1, only: Only = ""
) -> None:
    """Studies on real data; a run that is done is not done again, unless its settings have changed."""
    failed: list[str] = []
    for name in _known(names, STUDIES):
        lines = [run for run in table(STUDIES[name], seeds, quick) if re.search(only, run.name)]
        for library in sorted({run.needs for run in STUDIES[name].runs(1) if is_missing(run.needs)}):
            console.print(
                f"{name}: runs that need {library} were left out: it is not installed", style="yellow"
            )
        for run, outcome in perform(STUDIES[name], _folder(quick), lines, workers, fresh=quick):
            if isinstance(outcome, FxInvertError):
                failed.append(f"{name} {run.file}: {outcome}")
                console.print(f"{name} {run.file} failed: {outcome}", style="red", markup=False)
            else:
                console.print(f"{name} {run.file}: {outcome.seconds:.1f} s", markup=False, highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command("document")
def document_page(quick: Quick = False) -> None:
    """The page of results and its pictures, from the files of results alone."""
    document.write(_folder(quick), QUICK / "results.md" if quick else document.PAGE)


def _folder(quick: bool) -> Path:
    return QUICK if quick else RESULTS


def _known(names: list[str] | None, known: Mapping[str, object]) -> list[str]:
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return names or list(known)


if __name__ == "__main__":
    app()
