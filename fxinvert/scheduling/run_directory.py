"""The directory that a run writes: every file whole or not there, and `finished` last.

    config.yaml  plan.txt  plan.json  weights.safetensors  model.onnx  metrics.json  timing.json  finished

and what `journal.py` writes while the run works. A run that ends before it has done anything leaves nothing; one that
fails after it has a result leaves a file `failed` that says why; any other can go on.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from fxinvert.content import tensors_of
from fxinvert.errors import DataError
from fxinvert.scheduling import journal
from fxinvert.scheduling.store import cannot_write, write_durably

FINISHED, FAILED, CONFIG = "finished", "failed", "config.yaml"
WEIGHTS, ONNX = "weights.safetensors", "model.onnx"

#: safetensors writes its metadata in no fixed order: a single key keeps the files the same byte for byte
METADATA_KEY = "fxinvert"


class RunDirectory:
    """A directory of results, made by `create` and closed by its `with` block.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path, created: Sequence[Path] = ()) -> None:
        self.path, self._created = path, created
        self._written: list[Path] = []
        self._began = time.perf_counter()

    @classmethod
    def create(cls, path: Path | None = None) -> RunDirectory:
        """A fresh directory.

        Args:
            path: a path that does not exist or is an empty directory; None: `runs/` and the time.

        Raises:
            DataError: it holds something already, or cannot be written.
        """
        chosen = path if path is not None else _by_time(Path("runs"))
        try:
            if chosen.is_file():
                raise DataError(f"the run directory {chosen} is a file; choose another path")
            if chosen.exists() and any(chosen.iterdir()):
                further = f", or go on with: fxinvert resume {chosen}" if is_resumable(chosen) else ""
                raise DataError(f"the run directory {chosen} is not empty; choose another path{further}")
            run = cls(chosen, [folder for folder in (chosen, *chosen.parents) if not folder.exists()])
            chosen.mkdir(parents=True, exist_ok=True)
            run.write_text(".writable", "")
            (chosen / ".writable").unlink()
        except OSError as error:
            raise cannot_write(chosen, error) from error
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """The directory of a run that was interrupted.

        Raises:
            DataError: there is no such run, it is finished, or another version has written it.
        """
        if not path.is_dir():
            raise DataError(f"there is no run directory {path}")
        if is_finished(path):
            raise DataError(f"the run in {path} is finished")
        if not (path / CONFIG).is_file():
            older = (path / "config.json").is_file()
            why = "an older version of fxinvert has written it" if older else f"it has no {CONFIG}"
            raise DataError(f"the run in {path} cannot go on: {why}; start a new one with post-train")
        (path / FAILED).unlink(missing_ok=True)
        return cls(path)

    def write_text(self, name: str, text: str) -> Path:
        """Writes a text file in UTF-8; what that has no bytes for, as in names of files, is written `\\udc..`."""
        return self._write(name, text.encode(errors="backslashreplace"))

    def write_json(self, name: str, content: Any) -> Path:
        """Writes a JSON file; numbers that JSON has no word for (NaN, infinity) become null."""
        text = json.dumps(_finite(content), indent=2, allow_nan=False, ensure_ascii=False)
        return self.write_text(name, f"{text}\n")  # in JSON, `\\udc..` is read back as it was

    def write_weights(self, model: nn.Module, about: dict[str, Any]) -> Path:
        """Writes `weights.safetensors`: every name of the model's state dict, and `about` as metadata."""
        from safetensors.torch import save

        # tied parameters are written under each of their names, so that the file loads strictly anywhere
        tensors = {name: v.detach().cpu().contiguous().clone() for name, v in tensors_of(model).items()}
        metadata = {METADATA_KEY: json.dumps(_finite(about), sort_keys=True, allow_nan=False)}
        return self._write(WEIGHTS, save(tensors, metadata))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            seconds = time.perf_counter() - self._began
            self.write_text(FINISHED, f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, after {seconds:.1f} s\n")
            journal.clear(self.path)
        elif journal.is_held(self.path):  # the run is another process's
            return
        elif (self.path / WEIGHTS).exists():
            with contextlib.suppress(DataError):  # what went wrong first is what is told
                self.write_text(FAILED, f"{kind.__name__}: {error}\n")
        elif not is_resumable(self.path):
            self._discard()

    def _discard(self) -> None:
        """Removes what was written, and the folders made for it unless something else has come into them."""
        with contextlib.suppress(OSError):
            for file in self._written:
                file.unlink(missing_ok=True)
            for folder in self._created:
                folder.rmdir()

    def _write(self, name: str, content: bytes) -> Path:
        path = self.path / name
        write_durably(path, content)
        self._written.append(path)
        return path


def is_finished(path: Path) -> bool:
    """Whether a directory holds a run that came to its end."""
    return (path / FINISHED).is_file()


def is_resumable(path: Path) -> bool:
    """Whether a directory holds a run that can go on."""
    return not is_finished(path) and (path / journal.ABOUT).is_file()


def _by_time(parent: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (f"{stamp}_{i}" if i else stamp for i in range(10_000))
    return next(parent / name for name in names if not (parent / name).exists())


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case Path():
            return str(value)
    return value
