"""A Ray cluster: tasks run on its nodes; what they refer to is in its object store. Ray is an optional extra."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from fxinvert.errors import DataError, FxInvertError
from fxinvert.scheduling.executor import Shared, WorkerDied, unpicklable

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Stored(Generic[B]):
    """A value in the cluster's object store; every worker fetches it once."""

    reference: Any

    def get(self) -> B:
        key = self.reference.hex()
        if key not in _fetched:
            while len(_fetched) >= _KEPT:
                del _fetched[next(iter(_fetched))]
            _fetched[key] = _ray().get(self.reference)
        value: B = _fetched[key]
        return value


#: values that this worker has fetched, the oldest first
_fetched: dict[str, Any] = {}
_KEPT = 4
#: seconds that a cluster may take to answer
_PATIENCE = 5.0


class RayExecutor:
    """Workers of a Ray cluster.

    Args:
        workers: tasks at the same time; None: as many as the cluster has cores.
        address: of a running cluster, e.g. `"ray://head:10001"` or `"auto"`; None: one is started on this machine.

    Raises:
        DataError: Ray is not installed.
    """

    name, remote = "ray", True

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        _ray()
        self.workers, self.address, self._asked = workers or 1, address, workers
        self._started = False

    def open(self, threads: int, scratch: Path | None) -> None:
        """Connects.

        Raises:
            DataError: the cluster cannot be reached.
        """
        ray = _ray()
        if not ray.is_initialized():
            try:
                if self.address:
                    _reach(self.address)
                    ray.init(self.address, log_to_driver=False)
                else:
                    with _modules_as_here():
                        ray.init(num_cpus=self._asked, log_to_driver=False, include_dashboard=False)
            except (OSError, RuntimeError, ValueError) as error:
                where = self.address or "on this machine"
                raise DataError(
                    f"the Ray cluster {where} cannot be reached: {error}. Start one with `ray start --head`, check "
                    "the address, or use executor='processes'"
                ) from error
            self._started = True
        self.workers = self._asked or max(int(ray.cluster_resources().get("CPU", 1)) // threads, 1)
        self._call = ray.remote(num_cpus=threads, max_retries=0)(_call)
        self._threads = threads

    def share(self, value: B) -> Shared[B]:
        try:
            return Stored(_ray().put(value))
        except FxInvertError:
            raise
        except (TypeError, AttributeError) as error:
            raise unpicklable(value, error) from error

    def forget(self, shared: Shared[Any]) -> None:
        """The object store counts references: there is nothing to do."""

    def run(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        ray = _ray()
        source, running = iter(items), list[Any]()
        try:
            while True:
                for item in islice(source, 2 * self.workers - len(running)):
                    running.append(self._call.remote(self._threads, function, item))
                if not running:
                    return
                done, running = ray.wait(running)
                yield ray.get(done[0])
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise WorkerDied(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        if self._started:
            _ray().shutdown()
            self._started = False


def _call(threads: int, function: Callable[[A], B], item: A) -> B:
    """In a worker."""
    import torch

    torch.set_num_threads(threads)
    return function(item)


@contextmanager
def _modules_as_here() -> Iterator[None]:
    """Processes that are started find the modules that this one finds."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _reach(address: str) -> None:
    """Knocks at a cluster's door: Ray itself would wait for minutes.

    Raises:
        OSError: nobody is there.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), _PATIENCE).close()


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise DataError(
            "executor='ray' needs Ray, which is not installed: pip install 'fxinvert[ray]', or use "
            "executor='processes'"
        ) from error
