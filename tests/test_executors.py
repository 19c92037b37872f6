"""Executors and the crew: the same bytes anywhere, in order, each task once, failures with their traceback."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import KINDS, data, network, train, weights
from torch import nn

import fxinvert
from fxinvert.errors import DataError, SolveError
from fxinvert.linalg import anchored
from fxinvert.scheduling.crew import Crew, Task, TaskError
from fxinvert.scheduling.executor import SerialExecutor
from fxinvert.scheduling.keys import content_key
from fxinvert.scheduling.processes import ProcessExecutor
from fxinvert.scheduling.store import TaskStore
from fxinvert.training import Auto, ClosedForm, Optimizer


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("closed_form", 2), *(pytest.param(kind, 4, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_processes_give_the_same_bytes_as_one_after_the_other(kind: str, workers: int) -> None:
    settings: dict[str, Any] = KINDS[kind] | {"sweeps": 1}
    assert weights(train(**settings, executor="processes", workers=workers)) == weights(train(**settings))


def test_how_much_memory_is_free_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: torch.device) -> int:
        raise AssertionError("which solver is taken depends on the memory that is free at the moment")

    expected = weights(train(sweeps=1))
    monkeypatch.setattr(anchored, "free_memory", asked)
    assert weights(train(sweeps=1)) == expected


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'fxinvert\[ray\]'"):
        train(executor="ray")


def test_the_number_of_threads_outside_does_not_matter() -> None:
    expected, before = weights(train(sweeps=1)), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert weights(train(sweeps=1)) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "cloud"}, "unknown executor 'cloud'; known are serial, processes, ray"),
        ({"executor": 3}, "executor 3 has no open, share, forget, run, close"),
        ({"executor": "serial", "workers": 4}, "serial executor has one worker, not 4"),
        ({"executor": "processes", "workers": 0}, "workers=0; a whole number of at least 1"),
        ({"executor": "processes", "workers": 2.5}, "workers=2.5 is float; a whole number"),
    ],
)
def test_bad_executors_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(**settings)


class Locked(nn.Sequential):
    """A model that cannot be sent."""

    def __init__(self) -> None:
        super().__init__(network())
        self.guard = threading.Lock()


def test_what_cannot_be_sent_is_named() -> None:
    executor = ProcessExecutor(1)
    executor.open(1, None)
    with pytest.raises(DataError, match=r"cannot be sent .*\.guard, a lock"):
        executor.share(Locked())
    executor.close()


class Guarded:
    """Batches, whose loader cannot be sent; called, it gives them, too."""

    def __init__(self) -> None:
        self.guard = threading.Lock()

    def __iter__(self) -> Iterator[Any]:
        return iter(data())

    __call__ = __iter__


def test_a_loader_is_read_here_and_need_not_be_sent() -> None:
    assert weights(train(Guarded(), executor="processes", workers=1, sweeps=1)) == weights(train(sweeps=1))


def test_a_factory_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(DataError, match=r"cannot be sent .*shards\[0\]\.guard, a lock"):
        train([Guarded()], executor="processes", workers=1)


def test_a_traced_graph_cannot_be_sent() -> None:
    graph = fxinvert.trace(network(), data()[0][0])
    with pytest.raises(DataError, match="a traced graph, which other processes cannot be sent"):
        fxinvert.post_train(graph, data(), executor="processes", workers=1)


# the crew


class Backwards(SerialExecutor):
    """Gives the results in the opposite order."""

    def run(self, function: Callable[..., Any], items: Any) -> Iterator[Any]:
        return iter([function(item) for item in items][::-1])


def tasks(function: Callable[[int], Any], count: int = 5) -> Iterator[Task]:
    return (Task(i, f"task {i}", function, (i,), content_key(function, i)) for i in range(count))


def square(i: int) -> int:
    return i * i


def test_results_come_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    for store in (None, TaskStore(tmp_path)):
        assert list(Crew(Backwards(), store).run(tasks(square))) == [0, 1, 4, 9, 16]


def test_stored_results_are_not_made_again(tmp_path: Path) -> None:
    done = []

    def noted(i: int) -> int:
        done.append(i)
        return i

    store = TaskStore(tmp_path)
    assert list(Crew(SerialExecutor(), store).run(tasks(noted, 2))) == [0, 1]
    assert list(Crew(Backwards(), store).run(tasks(noted, 4))) == [0, 1, 2, 3]
    assert done == [0, 1, 2, 3]


def test_a_result_is_stored_before_it_is_reported(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    for i, _ in enumerate(Crew(SerialExecutor(), store).run(tasks(square))):
        assert len(store) >= i + 1


def test_a_task_that_fails_now_and_then_is_tried_again() -> None:
    failures = {1: 2, 3: 1}

    def unreliable(i: int) -> int:
        if failures.get(i, 0):
            failures[i] -= 1
            raise OSError("the network is down")
        return i

    assert list(Crew(SerialExecutor(), retries=2).run(tasks(unreliable))) == [0, 1, 2, 3, 4]


def test_a_task_that_keeps_failing_ends_the_run_with_its_traceback() -> None:
    def broken(i: int) -> int:
        return i // (i - 2)

    with pytest.raises(TaskError, match=r"task 2 failed 3 times.*(?s:.*)line \d+, in broken"):
        list(Crew(SerialExecutor(), retries=2).run(tasks(broken)))


def test_errors_of_ours_are_not_tried_again() -> None:
    calls = []

    def refused(i: int) -> int:
        calls.append(i)
        raise SolveError("singular")

    with pytest.raises(SolveError, match="singular"):
        list(Crew(SerialExecutor(), retries=5).run(tasks(refused)))
    assert calls == [0]


def python_has_none_left(i: int) -> int:
    raise MemoryError


def torch_has_none_left(i: int) -> int:
    return len(torch.empty(2**46))


def torch_has_none_left_in_our_code(i: int) -> int:
    try:
        return torch_has_none_left(i)
    except RuntimeError as error:
        raise DataError("the model does not run on these inputs") from error


@pytest.mark.parametrize(
    "greedy", [python_has_none_left, torch_has_none_left, torch_has_none_left_in_our_code]
)
def test_out_of_memory_says_what_to_lower(greedy: Callable[[int], int]) -> None:
    with pytest.raises(TaskError, match="task 0 needs more memory than there is: lower the batch size"):
        list(Crew(SerialExecutor()).run(tasks(greedy)))


def test_workers_read_their_own_data() -> None:
    shards = [Shard(i) for i in range(5)]
    there = weights(train(shards, executor="processes", workers=2, sweeps=1))
    assert there == weights(train(shards, sweeps=1))


class Shard:
    """A fifth of the data, wherever it is read."""

    def __init__(self, index: int) -> None:
        self.index, self.home = index, os.getpid()

    def __call__(self) -> Iterator[Any]:
        yield from data()[4 * self.index : 4 * self.index + 4]


# keys


def test_keys_tell_what_matters_apart() -> None:
    values: list[Any] = [
        1, 1.0, True, "1", None, [1], [[1]], {"a": 1}, {"a": 2}, {"b": 1}, torch.ones(2), torch.zeros(2),
        torch.ones(2, 1), torch.ones(2).double(), ClosedForm(), ClosedForm(damping=0.1), square, tasks,
    ]  # fmt: skip
    assert len({content_key(value) for value in values}) == len(values)
    one = torch.zeros(25, 25)[:1, :1].mT  # contiguous, but with strides that no view of its bytes can have
    assert content_key(one) == content_key(torch.zeros(1, 1))
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key(ClosedForm()) == content_key(ClosedForm())


def test_auto_gives_the_same_bytes_elsewhere_and_with_a_journal(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "method": Auto(learning_rates=(1e-2,), runs=2, optimizer=Optimizer(epochs=1)),
        "sweeps": 1,
    }
    here = weights(train(**given))
    assert here == weights(train(executor="processes", workers=1, **given))
    assert here == weights(train(run_directory=tmp_path / "run", **given))
