"""CIFAR batches, in their binary form and in the Python one, whose pickles are read without running anything of theirs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fxinvert.errors import DataError
from fxinvert.sources.arrays import Array, ArrayBatches, array_batches
from fxinvert.sources.options import DataOptions

#: channels, height, width
SHAPE, SIZE = (3, 32, 32), 3072


def cifar_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The training and the test batches of a folder, in the binary form if there are both."""
    for suffix in (".bin", ""):
        train = [file for i in range(1, 6) if (file := folder / f"data_batch_{i}{suffix}").is_file()]
        for trained, tested in ((train, "test_batch"), ([folder / f"train{suffix}"], "test")):
            if trained and all(file.is_file() for file in trained):
                return trained, [file] if (file := folder / f"{tested}{suffix}").is_file() else []
    return [], []


def load_cifar(
    folder: Path, files: tuple[list[Path], list[Path]], options: DataOptions
) -> tuple[ArrayBatches, ArrayBatches | None]:
    """The training images of a folder, and its test images if it holds some; of CIFAR-100 the fine classes.

    Args:
        folder: where they are.
        files: see `cifar_files`.
        options: how they are read.

    Raises:
        DataError: a file is damaged, or holds something else.
    """
    made = []
    for part, own in zip(("training", "test"), files, strict=True):
        if own:
            read = [_binary(file) if file.suffix == ".bin" else _pickled(file) for file in own]
            x, y = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
            names = f"the {part} images", f"the {part} labels"
            made.append(array_batches(x, y, names, options, folder))
    return made[0], made[1] if len(made) > 1 else None


def _binary(path: Path) -> tuple[Array, Array]:
    """Records of one class number, or a coarse and a fine one for CIFAR-100, and the pixels."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    labels = 1 if path.name.startswith(("data_batch", "test_batch")) else 2
    if not len(content) or len(content) % (labels + SIZE):
        raise DataError(
            f"{path} has {len(content)} bytes; CIFAR's records are {labels} and {SIZE} bytes: it is damaged or cut off"
        )
    records = content.reshape(-1, labels + SIZE)
    return _pictures(records[:, labels:]), records[:, labels - 1].astype(np.int64)


def _pickled(path: Path) -> tuple[Array, Array]:
    """A dict of `data`, (N, 3072) bytes, and `labels` or `fine_labels`."""
    try:
        with path.open("rb") as file:
            content = _Reader(file, encoding="bytes").load()
        found = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        pixels = found["data"].array()
        labels = np.array(found.get("fine_labels", found.get("labels")), dtype=np.int64)
        return _pictures(pixels), labels
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read as a CIFAR batch: {reason}") from error


def _pictures(pixels: Array) -> Array:
    return pixels.reshape(-1, *SHAPE).transpose(0, 2, 3, 1)


class _Stored:
    """What a pickle says of an array; nothing of numpy's is called."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> Array:
        """The array, if it is one of bytes in rows of the right size.

        Raises:
            ValueError: it is another one.
        """
        _, shape, kind, by_columns, content = self.state
        if not (
            isinstance(kind, _Kind) and kind.name in ("u1", b"u1") and shape[1:] == (SIZE,) and not by_columns
        ):
            raise ValueError(f"its data are of shape {shape}, not images of {SIZE} bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Kind:
    """What a pickle says of a dtype."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have none of."""


def _reconstruct(*_: Any) -> _Stored:
    return _Stored()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the protocols of Python 2."""
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


#: everything that a CIFAR batch names, and what stands for it here
ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Stored,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    """Admits what CIFAR batches hold, and refuses any other name before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no CIFAR batch holds and which could run code"
            )
        return ADMITTED[module, name]
