"""Progress of long work: logged, shown on a terminal, silent in a pipe, never in the way of results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)


class Display:
    """Two bars: one for the run, which advances by wave, and one for the tasks of what is being done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._run = progress.add_task("starting", total=total)
        self._tasks = progress.add_task("", total=None, visible=False)

    def advance(self, text: str) -> None:
        """A wave is done; the text says how it went."""
        log.info(text)
        run = self._progress.tasks[self._run]
        # that waves are repeated where there is doubt is not known before
        total = max(run.total or 0, run.completed + 1)
        self._progress.update(self._run, total=total, advance=1, description=text)

    def begin(self, text: str, total: int | None) -> None:
        """Tasks begin: what they do, and how many they are, if that is known."""
        log.debug(text)
        self._progress.reset(self._tasks, total=total, description=f"  {text}", visible=True)

    def done(self, count: int) -> None:
        """So many of the tasks are done."""
        self._progress.update(self._tasks, completed=count)


@contextmanager
def progress_display(total: int, show: bool | None) -> Iterator[Display]:
    """Bars on standard error, with the time that is left.

    Args:
        total: number of waves.
        show: whether to show them; None: if standard error is a terminal.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not (console.is_terminal if show is None else show)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield Display(progress, total)
