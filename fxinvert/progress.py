"""Progress bars for long work: shown on a terminal, silent in a pipe, never in the way of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

#: advances the bar by one and says what comes next
Advance = Callable[[str], None]


@contextmanager
def progress_bar(total: int, show: bool | None) -> Iterator[Advance]:
    """A bar of `total` steps on standard error.

    Args:
        total: number of steps.
        show: whether to show it; None: if standard error is a terminal.
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
        task = progress.add_task("starting", total=total)

        def advance(next_step: str) -> None:
            progress.update(task, advance=1, description=next_step)

        yield advance
