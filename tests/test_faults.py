"""Crashes: whatever is killed and whatever is damaged, a run goes on and ends with the same bytes."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import KINDS, data, events, network, train, weights

import fxinvert
from fxinvert import PostTrainingResult
from fxinvert.errors import DataError
from fxinvert.post_training import open_journal
from fxinvert.scheduling.crew import TaskError
from fxinvert.scheduling.journal import TASKS
from fxinvert.scheduling.processes import ProcessExecutor
from fxinvert.scheduling.store import SUFFIX
from fxinvert.training import ClosedForm


def small(folder: Path | None = None) -> PostTrainingResult:
    return train(data(128), chunk=2, sweeps=1, run_directory=folder)


def killed_after(seconds: float, folder: Path) -> bool:
    """Runs in a process of its own, killed after some time; whether it was still at work."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        small(folder)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def kill_the_main_process(folder: Path, kills: int) -> None:
    expected = weights(small())
    began = time.perf_counter()
    small(folder / "timed")
    whole = time.perf_counter() - began
    chance, done = random.Random(kills), 0
    for attempt in range(20 * kills):
        run = folder / f"{attempt}"
        # several kills of one run, now and then, so that it has to go on more than once
        for _ in range(5):
            if done == kills or not killed_after(chance.uniform(0, whole), run):
                break
            done += 1
        assert weights(small(run)) == expected
        finished = Counter(line["key"] for line in events(run, "task"))
        assert set(finished.values()) <= {1}, "a task that was finished was done again"
        if done == kills:
            return
    pytest.fail(f"only {done} of {kills} runs were still at work when they were to be killed")


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killing_the_main_process_changes_nothing(tmp_path: Path, kills: int) -> None:
    kill_the_main_process(tmp_path, kills)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killing_workers_changes_nothing(tmp_path: Path, kills: int) -> None:
    executor, chance = ProcessExecutor(2), random.Random(0)
    # many tasks, so that it is still at work when it is killed again
    settings: dict[str, Any] = {"sweeps": 1, "chunk": 1}
    killed: list[list[int]] = []
    stop = threading.Event()

    def kill() -> None:
        while len(killed) < kills and not stop.is_set():
            time.sleep(chance.uniform(0, 0.1))
            pool = executor._pool
            workers = list(getattr(pool, "_processes", None) or ())
            if workers and events(tmp_path, "task")[3 * len(killed) :]:
                os.kill(chance.choice(workers), signal.SIGKILL)
                killed.append(workers)
                time.sleep(0.2)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = train(run_directory=tmp_path, executor=executor, retries=kills + 1, **settings)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == kills
    assert weights(result) == weights(train(**settings))
    assert set(Counter(line["key"] for line in events(tmp_path, "task")).values()) == {1}


def always_dies(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(ClosedForm):
    """A method whose job kills its process."""

    def train(self, work: Any, segments: Any) -> Any:
        for block in work.blocks(always_dies, {}, None):
            yield list(block)


def test_workers_that_keep_dying_end_the_run_and_it_is_said_what_to_lower() -> None:
    with pytest.raises(TaskError, match=r"workers died 1 times.*lower the batch size, `chunk`"):
        train(method=Deadly(), executor="processes", workers=1, retries=0)


def interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException, **settings: Any
) -> None:
    """Begins a run that fails when the file after the first `after` ones is written."""
    from fxinvert.scheduling import store

    write, count = store.write_durably, 0

    def failing(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise error
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_durably", failing)
        with pytest.raises(type(error)):
            train(run_directory=folder, **settings)


@pytest.mark.parametrize("damage", ["truncate", "corrupt", "empty"])
def test_damaged_task_files_are_found_and_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    interrupted(tmp_path, monkeypatch, 10, KeyboardInterrupt())
    files = sorted((tmp_path / TASKS).glob(f"*{SUFFIX}"))
    assert len(files) > 3
    for file in files:
        content = bytearray(file.read_bytes())
        if damage == "corrupt":
            content[len(content) // 2] ^= 1
        file.write_bytes(
            content[: {"truncate": len(content) - 7, "corrupt": len(content), "empty": 0}[damage]]
        )
    assert weights(train(run_directory=tmp_path)) == weights(train())
    assert len(events(tmp_path, "damaged")) == len(files)


def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, count = os.fsync, 0

    def full(file: int) -> None:
        nonlocal count
        count += 1
        if count > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"cannot write .*: No space left on device; make room"):
            train(run_directory=tmp_path)
    assert not list((tmp_path / TASKS).glob("*.part"))
    assert weights(train(run_directory=tmp_path)) == weights(train())


def test_a_disk_that_is_full_from_the_beginning_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*: No space left on device; make room"):
        train(run_directory=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_workers_are_sent_does_not_fit_on_the_disk() -> None:
    executor = ProcessExecutor(1)
    executor.open(1, None)
    assert executor._folder is not None
    (executor._folder / "0.pt").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"cannot write .*: No space left on device; make room"):
        executor.share(torch.rand(10**6))
    executor.close()


def test_control_c_is_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch, 12, KeyboardInterrupt())
    done = {line["key"] for line in events(tmp_path, "task")}
    assert events(tmp_path, "interrupted")
    assert weights(train(run_directory=tmp_path)) == weights(train())
    again = [line["key"] for line in events(tmp_path, "task")][len(done) :]
    assert done
    assert done.isdisjoint(again)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on_elsewhere_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    interrupted(tmp_path, monkeypatch, 2, KeyboardInterrupt(), **KINDS[kind])
    assert events(tmp_path, "task")
    resumed = train(run_directory=tmp_path, executor="processes", workers=2, **KINDS[kind])
    assert weights(resumed) == weights(train(**KINDS[kind]))
    assert set(Counter(line["key"] for line in events(tmp_path, "task")).values()) == {1}


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    first = train(run_directory=tmp_path)
    count = len(events(tmp_path, "task"))
    second = train(run_directory=tmp_path)
    assert weights(first) == weights(second)
    assert [r.after for r in first.history] == [r.after for r in second.history]
    assert len(events(tmp_path, "task")) == count


def test_a_failure_before_anything_is_done_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN"):
        train(
            [(torch.full((4, 6), torch.nan), torch.zeros(4, dtype=torch.long))],
            run_directory=tmp_path / "a" / "b",
        )
    assert not list(tmp_path.iterdir())


def test_two_processes_on_one_run_the_second_says_who_holds_it(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path),
        pytest.raises(DataError, match=rf"in use by process {os.getpid()} of .* on .*, since"),
    ):
        train(run_directory=tmp_path)
    train(run_directory=tmp_path)


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"sweeps": 3}, "settings: sweeps"),
    ({"method": ClosedForm(damping=0.5)}, "settings: method"),
    ({"schedule": "parallel"}, "settings: waves"),
    ({"chunk": 2}, "settings: chunks"),
    ({"memory_limit": 2**20}, "settings: memory_limit"),
    ({"given": data(shift=0.1)}, "data: train"),
    ({"given": data()[:-1]}, "data: train"),
]


@pytest.mark.parametrize(("change", "said"), CHANGED, ids=[said for _, said in CHANGED])
def test_another_run_in_the_same_directory_is_refused_with_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    interrupted(tmp_path, monkeypatch, 7, KeyboardInterrupt())
    with pytest.raises(DataError, match=f"begun with something else.*{said}"):
        train(**change, run_directory=tmp_path)
    assert weights(train(run_directory=tmp_path)) == weights(train()), "something of the run was lost"


def test_a_run_goes_on_with_the_same_data_in_another_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch, 7, KeyboardInterrupt())
    assert weights(train(lambda: data(), run_directory=tmp_path)) == weights(train())
    assert set(Counter(line["key"] for line in events(tmp_path, "task")).values()) == {1}


def test_another_model_is_refused_by_the_names_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch, 7, KeyboardInterrupt())
    other = network()
    with torch.no_grad():
        other.get_submodule("2").bias.add_(1)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"model: 2\.bias \("):
        fxinvert.post_train(
            other, data(), sweeps=2, chunk=4, output_target="cross_entropy", run_directory=tmp_path
        )


def test_a_run_of_another_format_is_refused(tmp_path: Path) -> None:
    train(run_directory=tmp_path)
    about = tmp_path / "run.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(DataError, match="written in format 1; this version of fxinvert reads format 2"):
        train(run_directory=tmp_path)
