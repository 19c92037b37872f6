"""The journal of a run: what it is, who holds it, what has been done. With it a run goes on after any crash.

run.json    the format, and what the run is about: model, plan, data, settings
lock        held by the process at work, by the operating system's leave; holder.json says who that is
tasks/      a file for every finished task that is still needed
log.jsonl   a line for everything that happened
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from fxinvert.errors import DataError
from fxinvert.scheduling.store import TaskStore, cannot_write, write_durably

#: of the files of a run; a run of another format cannot go on
FORMAT = 2
ABOUT, LOCK, HOLDER, TASKS, LOG, SCRATCH = "run.json", "lock", "holder.json", "tasks", "log.jsonl", "scratch"
#: what is there only while the run works
TRANSIENT = {LOCK, HOLDER, TASKS, SCRATCH}


class Journal:
    """Opened by `open`, closed by its `with` block; only one process can have it open.

    Args:
        folder: the run directory.
        known: the classes that results of tasks are made of.

    Attributes:
        store: the finished tasks.
    """

    def __init__(self, folder: Path, known: list[type]) -> None:
        self.folder = folder
        self._fresh = not (folder / ABOUT).exists()
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise DataError(f"the run directory {folder} is in use by {holder(folder)}") from error
        except OSError as error:
            raise cannot_write(folder, error) from error
        try:
            who = {"process": os.getpid(), "host": socket.gethostname(), "user": _user(), "since": _now()}
            write_durably(folder / HOLDER, json.dumps(who).encode())
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            self.store = TaskStore(folder / TASKS, known)
            self.note("begun" if self._fresh else "resumed", process=os.getpid())
        except DataError:
            self._release()
            if self._fresh:
                self._discard()
            raise

    @property
    def scratch(self) -> Path:
        """Where large things may be written until the run ends."""
        return self.folder / SCRATCH

    def is_about(self, identity: Mapping[str, Any]) -> None:
        """Writes what the run is about, or compares with what it was about when it began.

        Args:
            identity: JSON-ready; for each part its content or digest.

        Raises:
            DataError: it is another run, or one that another version of fxinvert has begun.
        """
        path = self.folder / ABOUT
        if not path.exists():
            content = {"format": FORMAT, "identity": identity}
            write_durably(path, f"{json.dumps(content, indent=2)}\n".encode())
            return
        before = read_about(self.folder)["identity"]
        changed = [name for name in identity if before.get(name) != identity[name]]
        if changed:
            raise DataError(
                f"the run in {self.folder} was begun with something else: {_differences(before, identity, changed)}. "
                "Nothing of it was changed; resume it with what it was begun with, or choose another run directory"
            )

    def note(self, event: str, **facts: Any) -> None:
        """Adds a line to the log.

        Raises:
            DataError: it cannot be written.
        """
        line = json.dumps({"time": _now(), "event": event, **facts}, ensure_ascii=False)
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise cannot_write(self.folder / LOG, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        keep = not self._fresh or len(self.store) > 0 or kind is None
        try:
            if kind is not None and keep:
                self.note(
                    "interrupted" if kind is KeyboardInterrupt else "failed",
                    error=f"{kind.__name__}: {error}",
                )
        except DataError as full:  # what went wrong first is what is told
            if error is not None:
                error.add_note(str(full))
        finally:
            self._release()
        if not keep:
            self._discard()

    def _release(self) -> None:
        (self.folder / HOLDER).unlink(missing_ok=True)
        (self.folder / LOCK).unlink(missing_ok=True)  # while it is held: nobody else can have it
        self._lock.release()

    def _discard(self) -> None:
        """Leaves nothing of a run in which nothing was done."""
        shutil.rmtree(self.folder / TASKS, ignore_errors=True)
        for name in (ABOUT, LOG):
            (self.folder / name).unlink(missing_ok=True)
        for folder in self._made:
            if not any(folder.iterdir()):
                folder.rmdir()


def clear(folder: Path) -> None:
    """Removes the finished tasks of a run that has come to its end."""
    shutil.rmtree(folder / TASKS, ignore_errors=True)


def holder(folder: Path) -> str:
    """Who has a run directory open, in words."""
    try:
        who = json.loads((folder / HOLDER).read_text())
        return f"process {who['process']} of {who['user']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def is_held(folder: Path) -> bool:
    """Whether a process has a run directory open."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def read_about(folder: Path) -> dict[str, Any]:
    """What a run is about.

    Raises:
        DataError: it is no run directory, or one of another version.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no run that can go on: {ABOUT} is missing or damaged") from error
    found = about.get("format")
    if found != FORMAT:
        raise DataError(
            f"the run in {folder} was written in format {found}; this version of fxinvert reads format {FORMAT}. "
            "Start a new run with the same configuration"
        )
    return dict(about)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log; one that a crash has cut off is left out."""
    lines = []
    try:
        text = (folder / LOG).read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], changed: list[str]) -> str:
    found = []
    for name in changed:
        old, new = before.get(name), now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            shown = ", ".join(f"{key} ({_short(old.get(key))} → {_short(new.get(key))})" for key in keys[:5])
            found.append(f"{name}: {shown}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else ""))
        else:
            found.append(f"{name} ({_short(old)} → {_short(new)})")
    return "; ".join(found)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:16]}…"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "an unknown user"
