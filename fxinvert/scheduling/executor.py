"""Executors: where a function is applied to the parts of some work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from fxinvert.errors import DataError

A = TypeVar("A")
B = TypeVar("B")


class Executor(Protocol):
    """Applies a function to items, anywhere, and gives the results in the order of the items."""

    name: str

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """The results, in order, as they become available."""
        ...


class SerialExecutor:
    """One after the other, in this process."""

    name = "serial"

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        return map(function, items)


def executor_named(choice: str | Executor) -> Executor:
    """The executor of that name, or the one given.

    Raises:
        DataError: there is none of that name.
    """
    if not isinstance(choice, str):
        return choice
    if choice != SerialExecutor.name:
        raise DataError(f"unknown executor {choice!r}; known is 'serial'")
    return SerialExecutor()
