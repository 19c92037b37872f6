"""Executors: where functions are called. The protocol is small, so that users can bring their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from fxinvert.errors import DataError, FxInvertError
from fxinvert.settings import check_choice, check_counts, check_like

A = TypeVar("A")
B = TypeVar("B")
T_co = TypeVar("T_co", covariant=True)


class Shared(Protocol[T_co]):
    """A value that calls refer to; it is sent to every worker at most once."""

    def get(self) -> T_co:
        """The value, in any process; not to be changed."""
        ...


class Executor(Protocol):
    """Calls a function on items, anywhere, in any order.

    Attributes:
        name: what it is called in settings.
        workers: how many calls are made at the same time.
        remote: whether calls are made in other processes, so that what they are given has to be sent.
    """

    name: str
    workers: int
    remote: bool

    def open(self, threads: int, scratch: Path | None) -> None:
        """Gets ready; called before anything else, again after `close`.

        Args:
            threads: of torch, in each call.
            scratch: a folder for large things, which is removed afterwards; None: the system's temporary one.
        """
        ...

    def share(self, value: B) -> Shared[B]:
        """Makes a value available to calls."""
        ...

    def forget(self, shared: Shared[Any]) -> None:
        """The value will not be referred to any more."""
        ...

    def run(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """The results, in the order in which they become available; items are taken as they are needed.

        Raises:
            WorkerDied: a process is gone; some items may have been called without a result.
        """
        ...

    def close(self) -> None:
        """Stops what is running and removes what was shared."""
        ...


class WorkerDied(FxInvertError):
    """A worker is gone, and with it what it was doing."""


@dataclass(frozen=True)
class Here(Generic[B]):
    """A value in this process."""

    value: B

    def get(self) -> B:
        return self.value


class SerialExecutor:
    """One after the other, in this process."""

    name, workers, remote = "serial", 1, False

    def open(self, threads: int, scratch: Path | None) -> None:
        """Nothing is needed."""

    def share(self, value: B) -> Shared[B]:
        return Here(value)

    def forget(self, shared: Shared[Any]) -> None:
        """Nothing is kept."""

    def run(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        return map(function, items)

    def close(self) -> None:
        """Nothing is left."""


def executor_named(
    choice: str | Executor, workers: int | None = None, address: str | None = None
) -> Executor:
    """The executor of that name, or the one given.

    Args:
        choice: "serial", "processes", "ray", or an executor.
        workers: how many; None: as many as there are cores, or as the cluster has.
        address: of a Ray cluster; None: one on this machine.

    Raises:
        DataError: there is none of that name, or it cannot be had here.
    """
    if not isinstance(choice, str):
        check_like(
            "executor", choice, ("open", "share", "forget", "run", "close"), "fxinvert.scheduling.Executor"
        )
        return choice
    check_choice("executor", choice, ("serial", "processes", "ray"))
    check_counts(workers=workers)
    if choice == "processes":
        from fxinvert.scheduling.processes import ProcessExecutor

        return ProcessExecutor(workers)
    if choice == "ray":
        from fxinvert.scheduling.ray_cluster import RayExecutor

        return RayExecutor(workers, address)
    if workers not in (None, 1):
        raise DataError(
            f"the serial executor has one worker, not {workers}; executor='processes' has several"
        )
    return SerialExecutor()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Gives torch so many threads: how sums are split over threads decides how they are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def unpicklable(value: Any, error: Exception) -> DataError:
    """Says which part of a value cannot be sent to another process."""
    from fxinvert.scheduling.pickling import culprit

    return DataError(
        f"other processes cannot be sent {culprit(value)}: {type(error).__name__}: {error}. "
        "Define functions and classes in a module, open files and connections where they are used, or use "
        "executor='serial'"
    )
