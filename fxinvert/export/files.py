"""Files that appear whole or not at all: written to a hidden folder beside their place, then moved."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fxinvert.errors import DataError


def named(path: str | os.PathLike[str]) -> Path:
    """The path of an ONNX file.

    Raises:
        DataError: It is no path, or onnx and onnxruntime cannot open files of that name.
    """
    try:
        os.fspath(path).encode()
    except TypeError as error:
        raise DataError(
            f"the path of the ONNX file is {type(path).__name__}; a str or Path is needed"
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"the name of {path} is not UTF-8, and onnx opens no such file; choose another path"
        ) from error
    return Path(path)


def destination_of(path: str | os.PathLike[str]) -> Path:
    """The path to write, refused before any work if it plainly cannot be written.

    Raises:
        DataError: It is a folder or a device, its own folder is not there, or its name is not UTF-8.
    """
    destination = named(path)
    parent = destination.parent
    try:
        if not destination.name or destination.is_dir():
            raise DataError(f"{destination} is a folder; give the path of the ONNX file to write")
        if destination.exists() and not destination.is_file():
            raise DataError(
                f"{destination} is a device or a pipe, which a file would replace; give the path of a file to write"
            )
        if not parent.exists():
            raise DataError(
                f"cannot write {destination}: the folder {parent} does not exist; create it first"
            )
        if not parent.is_dir():
            raise DataError(
                f"cannot write {destination}: {parent} is a file, not a folder; choose another path"
            )
    except (OSError, ValueError) as error:  # a zero in the path
        raise unwritable(destination, error) from error
    return destination


def workplace(destination: Path) -> tempfile.TemporaryDirectory[str]:
    """A hidden folder beside the destination (same file system, so that the last step is one rename).

    Raises:
        DataError: Nothing can be written there.
    """
    try:
        return tempfile.TemporaryDirectory(
            dir=destination.parent, prefix=".fxinvert-export-", ignore_cleanup_errors=True
        )
    except OSError as error:
        raise unwritable(destination, error) from error


def move(folder: Path, destination: Path) -> None:
    """Move what was written to its place; the file that refers to the others goes last.

    Raises:
        DataError: It cannot be moved.
    """
    try:
        for item in sorted(folder.iterdir(), key=lambda item: (item.name == destination.name, item.name)):
            os.replace(item, destination.with_name(item.name))
    except OSError as error:
        raise unwritable(destination, error) from error


def unwritable(destination: Path, error: Exception) -> DataError:
    """The error of a path that cannot be written."""
    return DataError(
        f"cannot write {destination}: {error}. Choose a path in a folder that you may write to and that has space left."
    )


def fixed_batch(file: Path) -> int | None:
    """The batch size that a file is fixed to; None where it is not, or cannot be read."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except DecodeError:
        return None  # which the proof tells
    weights = {value.name for value in graph.initializer}
    shapes = [value.type.tensor_type.shape.dim for value in graph.input if value.name not in weights]
    found = {shape[0].dim_value for shape in shapes if len(shape)}
    return found.pop() or None if len(found) == 1 else None
