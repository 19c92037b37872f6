"""The crew: tasks are done by an executor, once each, and nothing that is done is lost.

A task's result is stored before it is reported; a stored result is never made again. Results come in the order of the
tasks. A task that fails, or whose worker dies, is tried again a few times.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fxinvert.errors import FxInvertError, out_of_memory
from fxinvert.scheduling.executor import Executor, WorkerDied
from fxinvert.scheduling.store import Damaged, TaskStore

log = logging.getLogger(__name__)

Note = Callable[..., None]
#: is told how many tasks are done
Progress = Callable[[int], None]

OUT_OF_MEMORY = (
    "needs more memory than there is: lower the batch size, `chunk`, `memory_limit`, or the number of workers"
)


class TaskError(FxInvertError):
    """A task failed as often as it may."""


@dataclass(frozen=True)
class Task:
    """A call.

    Attributes:
        index: its place in the order of results.
        name: how it is called in messages and the log.
        function: of a module, called with `arguments`.
        arguments: what can be sent.
        key: of its content; "" where results are not stored.
    """

    index: int
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    key: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a result, or an error with its traceback; what time and processor seconds it took."""

    index: int
    result: Any
    error: Exception | None
    trace: str
    seconds: float
    processor: float
    process: int


@dataclass(frozen=True)
class _Stored:
    """Stands for a result that is read when it is its turn."""

    key: str


class Crew:
    """Has tasks done.

    Args:
        executor: by whom.
        store: of results; None: nothing is kept.
        retries: how often a task that failed is tried again.
        note: the log: called with an event's name and its facts.
    """

    def __init__(
        self,
        executor: Executor,
        store: TaskStore | None = None,
        retries: int = 2,
        note: Note = lambda *_, **__: None,
    ) -> None:
        self.executor, self.store, self.retries, self.note = executor, store, retries, note
        #: keys of stored results that were asked for since they were last taken from here
        self.used: list[str] = []

    def run(self, tasks: Iterable[Task], progress: Progress = lambda _: None) -> Iterator[Any]:
        """The results, in the order of the tasks.

        Raises:
            TaskError: a task failed too often, or workers kept dying.
            FxInvertError: as a task raised it.
        """
        ready: dict[int, Any] = {}
        following = 0
        for index, result in self._unordered(tasks):
            ready[index] = result
            progress(len(ready) + following)
            while following in ready:
                value = ready.pop(following)
                yield self._again(value) if isinstance(value, _Stored) else value
                following += 1

    def _unordered(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """The results as they become available; those that were stored before stay there."""
        source = iter(tasks)
        waiting: dict[int, Task] = {}
        again: deque[Task] = deque()
        stored: deque[tuple[int, Any]] = deque()
        failures: Counter[int] = Counter()
        deaths = 0

        def todo() -> Iterator[Task]:
            while again:
                yield again.popleft()
            for task in source:
                if self._is_stored(task):
                    stored.append((task.index, _Stored(task.key)))
                else:
                    waiting[task.index] = task
                    yield task

        while True:
            try:
                for outcome in self.executor.run(perform, todo()):
                    task = waiting[outcome.index]
                    if outcome.error is None:
                        deaths = 0
                        self._store(task, outcome)
                        del waiting[outcome.index]
                        yield outcome.index, outcome.result
                    else:
                        failures[outcome.index] += 1
                        self._failed(task, outcome, failures[outcome.index])
                        again.append(task)
                    while stored:
                        yield stored.popleft()
            except WorkerDied as error:
                deaths += 1
                names = ", ".join(task.name for task in waiting.values())
                self.note("worker died", tasks=names, deaths=deaths)
                log.warning("a worker died while it did %s", names)
                if deaths > self.retries:
                    raise TaskError(
                        f"workers died {deaths} times while they did: {names}. {error} If a task {OUT_OF_MEMORY}."
                    ) from error
                again = deque(waiting.values())
            while stored:
                yield stored.popleft()
            if not waiting:
                return

    def _is_stored(self, task: Task) -> bool:
        if self.store is None:
            return False
        self.used.append(task.key)
        try:
            return self.store.get(task.key)[0]
        except Damaged as error:
            self.note("damaged", task=task.name, key=task.key, file=str(error))
            return False

    def _again(self, stored: _Stored) -> Any:
        assert self.store is not None, "a stored result without a store"
        return self.store.get(stored.key)[1]

    def _store(self, task: Task, outcome: Outcome) -> None:
        if self.store is not None:
            self.store.put(task.key, outcome.result)
        self.note(
            "task",
            task=task.name,
            key=task.key,
            seconds=round(outcome.seconds, 4),
            processor=round(outcome.processor, 4),
            process=outcome.process,
        )

    def _failed(self, task: Task, outcome: Outcome, times: int) -> None:
        error = outcome.error
        assert error is not None
        self.note("task failed", task=task.name, error=f"{type(error).__name__}: {error}", times=times)
        log.warning("%s failed: %s: %s", task.name, type(error).__name__, error)
        if isinstance(error, FxInvertError):  # it will not be otherwise the next time
            raise error
        if isinstance(error, MemoryError):
            raise TaskError(f"{task.name} {OUT_OF_MEMORY}. {outcome.trace}") from error
        if times > self.retries:
            raise TaskError(
                f"{task.name} failed {times} times, at last with {type(error).__name__}: {error}\n\n"
                f"In process {outcome.process}:\n{outcome.trace}"
            ) from error


def perform(task: Task) -> Outcome:
    """Does a task, wherever it is."""
    began, used = time.perf_counter(), time.process_time()
    result, failed, trace = None, None, ""
    try:
        result = task.function(*task.arguments)
    except Exception as error:  # noqa: BLE001  a task runs anyone's code; the crew raises it
        failed = MemoryError(str(error)) if out_of_memory(error) else _sendable(error)
        trace = traceback.format_exc()
    spent, used = time.perf_counter() - began, time.process_time() - used
    return Outcome(task.index, result, failed, trace, spent, used, os.getpid())


def _sendable(error: Exception) -> Exception:
    """The error as it can be sent to another process."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  pickling runs anyone's code
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
