"""Worker processes on this machine (loky): each imports fxinvert once, and keeps what it has been sent."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from loky import ProcessPoolExecutor

from fxinvert.errors import FxInvertError
from fxinvert.scheduling.executor import Shared, WorkerDied, unpicklable
from fxinvert.scheduling.pickling import read_once, write
from fxinvert.scheduling.store import cannot_write

A = TypeVar("A")
B = TypeVar("B")

#: how often a worker looks whether its parent is still there, in seconds
_WATCH = 0.5


@dataclass(frozen=True)
class Filed(Generic[B]):
    """A value in a file; every process reads it once, large tensors mapped into memory."""

    path: Path

    def get(self) -> B:
        value: B = read_once(self.path)
        return value


class ProcessExecutor:
    """Several processes.

    Args:
        workers: how many; None: as many as this process may use cores.
    """

    name, remote = "processes", True

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        self._folder: Path | None = None
        self._numbers = itertools.count()

    def open(self, threads: int, scratch: Path | None) -> None:
        """Gets ready.

        Raises:
            DataError: the folder for large things cannot be made.
        """
        self._threads = threads
        try:
            if scratch is not None:
                scratch.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="fxinvert-", dir=scratch))
        except OSError as error:
            raise cannot_write(scratch or Path(tempfile.gettempdir()), error) from error

    def share(self, value: B) -> Shared[B]:
        assert self._folder is not None, "the executor is not open"
        path = self._folder / f"{next(self._numbers)}.pt"
        try:
            write(value, path)
        except FxInvertError:
            raise
        except OSError as error:
            raise cannot_write(path, error) from error
        except Exception as error:  # pickling runs anyone's code
            raise unpicklable(value, error) from error
        return Filed(path)

    def forget(self, shared: Shared[Any]) -> None:
        assert isinstance(shared, Filed), "a value of another executor"
        shared.path.unlink(missing_ok=True)  # who has mapped it keeps it

    def run(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        source, running = iter(items), set[Future[Any]]()
        try:
            while True:
                for item in itertools.islice(source, 2 * self.workers - len(running)):
                    running.add(self._workers().submit(function, item))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            self._stop()
            raise WorkerDied(str(error).strip().splitlines()[0]) from error
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        self._stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        read_once.cache_clear()

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            count = str(self._threads)
            env = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "passive"}
            self._pool = ProcessPoolExecutor(
                self.workers, initializer=_begin, initargs=(os.getpid(), self._threads), env=env
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, kill_workers=True)
            self._pool = None


def _begin(parent: int, threads: int) -> None:
    """In a new worker: leave Ctrl-C to the parent, end with the parent, use so many threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)
