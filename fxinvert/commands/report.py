"""Report on a finished run: a page to look at, and the same facts to parse."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from fxinvert.commands.finished import REPAIRS, FinishedRun, read_json
from fxinvert.errors import FxInvertError
from fxinvert.report.console import print_json
from fxinvert.report.page import render
from fxinvert.report.record import Subject, build
from fxinvert.scheduling.run_directory import RunDirectory

PAGE, FACTS = "report.html", "report.json"


def report(path: Path, out: Path | None, console: Console, as_json: bool = False) -> Path:
    """Writes the report of a finished run; the path of the page.

    Args:
        path: the run's directory.
        out: the folder to write to, by default the run's.
        console: where to tell about it.
        as_json: whether to print the facts.

    Raises:
        FxInvertError: there is no such run, its model or data cannot be loaded any more, or nothing can be written.
    """
    run = FinishedRun.open(path)
    made = build(
        Subject(
            name=path.resolve().name,
            before=run.before,
            after=run.after,
            data=run.data,
            data_name=run.data_name,
            example=run.example,
            output=run.output,
            plan=run.plan(),
            settings=run.settings,
            metrics=read_json(path, "metrics.json"),
            timing=read_json(path, "timing.json"),
            repairs=read_json(path, REPAIRS) if (path / REPAIRS).is_file() else {},
        )
    )
    folder = RunDirectory(path) if out is None else RunDirectory.create(out)
    facts = folder.write_json(FACTS, made.facts)
    page = folder.write_text(PAGE, render(made))
    if as_json:
        print_json(json.loads(facts.read_text(encoding="utf-8")))
    else:
        console.print(f"Report: {page} (open it in a browser), {facts.name} beside it.", soft_wrap=True)
    return page


def conclude(run: Path, with_report: bool, console: Console, as_json: bool) -> None:
    """What follows a finished run: its report, and its figures as JSON, if they are wanted.

    Args:
        run: its directory.
        with_report: whether to write the report.
        console: where to tell about it.
        as_json: whether to print the figures on standard output.

    Raises:
        FxInvertError: the report cannot be written; the run is finished all the same.
    """
    if with_report:
        try:
            report(run, None, console)
        except FxInvertError as error:
            error.add_note(f"The run is finished. Its report can be tried again: fxinvert report {run}")
            raise
    if as_json:
        print_json({"run": str(run)} | read_json(run, "metrics.json"))
