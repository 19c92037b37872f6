"""Sending values to other processes: one file per value, its tensors mapped into memory where it is read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from fxinvert.errors import FxInvertError

#: values that a process keeps, beside those that it works with
_KEPT = 4


def write(value: Any, path: Path) -> None:
    """Writes a value for `read`.

    Raises:
        OSError: it cannot be written.
        Exception: whatever pickling a part of the value raises.
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file, pickle_module=cloudpickle)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch tells of a full disk in words of its own
            raise error.__context__ from error
        raise


def read(path: Path) -> Any:
    """What `write` has written; only for files of our own, since pickles can run anything."""
    return torch.load(path, mmap=True, weights_only=False)


#: the same, remembered
read_once = lru_cache(maxsize=_KEPT)(read)


def culprit(value: Any) -> str:
    """The innermost part of a value that cannot be pickled, in words: `attribute 'lock' of Loader`."""
    path, current = "", value
    for _ in range(20):
        inner = next(((n, part) for n, part in _parts(current) if not _can(part)), None)
        if inner is None:
            break
        path, current = path + inner[0], inner[1]
    name = type(value).__name__
    return f"{name}{path}, a {type(current).__name__}" if path else f"a {name}"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    else:
        bound = getattr(value, "__self__", None)
        if bound is not None:
            yield ".__self__", bound
        for i, cell in enumerate(getattr(value, "__closure__", None) or ()):
            yield f" (what it closes over, {value.__code__.co_freevars[i]!r})", cell.cell_contents
        state = (
            value.__getstate__() if hasattr(value, "__getstate__") and not isinstance(value, type) else None
        )
        yield from ((f".{key}", part) for key, part in (state if isinstance(state, dict) else {}).items())


def _can(value: Any) -> bool:
    try:
        torch.save(value, io.BytesIO(), pickle_module=cloudpickle)
    except FxInvertError:
        raise
    except Exception:  # noqa: BLE001  pickling runs anyone's code
        return False
    return True
