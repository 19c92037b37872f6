"""The store of finished tasks: one file each, whole or not there, found damaged by its checksum."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fxinvert.errors import DataError

MAGIC = b"fxinvert task 1\n"
SUFFIX = ".task"


class TaskStore:
    """Results of tasks by key.

    Args:
        folder: where they are; made if need be.
        known: the classes that results are made of, besides tensors, containers and numbers.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, folder: Path, known: Iterable[Callable[..., Any]] = ()) -> None:
        self.folder = folder
        self.known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = list(known)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        for part in folder.glob("*.part"):  # of a process that was killed while it wrote
            part.unlink()

    def put(self, key: str, result: Any) -> None:
        """Writes a result; when this returns, it will be there after any crash.

        Raises:
            DataError: it cannot be written, as on a full disk.
        """
        buffer = io.BytesIO()
        torch.save(result, buffer)
        payload = buffer.getvalue()
        write_durably(self._path(key), MAGIC + hashlib.sha256(payload).digest() + payload)

    def get(self, key: str) -> tuple[bool, Any]:
        """Whether there is a result, and which. A file that is damaged is removed, as if it had never been there.

        Raises:
            Damaged: a file was removed; the task has to be done again.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False, None
        digest, payload = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
        if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != digest:
            path.unlink()
            raise Damaged(path)
        with torch.serialization.safe_globals(self.known):
            return True, torch.load(io.BytesIO(payload), weights_only=True)

    def remove(self, keys: Iterable[str]) -> None:
        """Forgets some results, if they are there."""
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob(f"*{SUFFIX}"))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


class Damaged(Exception):
    """A task's file whose content is not what was written."""


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file: whole, or not at all, and on the disk when this returns.

    Raises:
        DataError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> DataError:
    """Says that a file cannot be written, and what helps."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room there" if full else "choose a path that you may write to"
    return DataError(f"cannot write {path}: {error.strerror or error}; {advice}")
