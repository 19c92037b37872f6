"""IDX files, the form MNIST and its kin come in: a header of the numbers' kind and the sizes, then the numbers."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from fxinvert.errors import DataError
from fxinvert.sources.arrays import Array, ArrayBatches, array_batches
from fxinvert.sources.options import DataOptions

NAME = re.compile(r"(?P<part>.*?)(?P<what>images|labels)[-._]idx\d[-._]ubyte(\.gz)?", re.IGNORECASE)
#: the third byte of a file, and what its numbers are (http://yann.lecun.com/exdb/mnist: "the IDX file format")
KINDS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def idx_files(folder: Path) -> dict[str, dict[str, Path]]:
    """The IDX files of a folder: for "train" and "test" those of "images" and "labels"."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        name = NAME.fullmatch(file.name)
        if name and file.is_file():
            part = "train" if "train" in name["part"].lower() else "test"
            found.setdefault(part, {}).setdefault(name["what"].lower(), file)
    return found


def load_idx(
    folder: Path, files: dict[str, dict[str, Path]], options: DataOptions
) -> tuple[ArrayBatches, ArrayBatches | None]:
    """The training images of a folder, and its test images if it holds some.

    Args:
        folder: where they are.
        files: see `idx_files`.
        options: how they are read.

    Raises:
        DataError: a file is missing, damaged, or does not fit the other.
    """
    parts = {}
    for part, own in files.items():
        missing = {"images", "labels"} - own.keys()
        if missing:
            raise DataError(
                f"{folder} holds {', '.join(p.name for p in own.values())} and no {part} {missing.pop()}"
            )
        x, y = read_idx(own["images"]), read_idx(own["labels"])
        names = own["images"].name, own["labels"].name
        parts[part] = array_batches(x, y, names, options, folder)
    if "train" not in parts:
        return parts["test"], None
    return parts["train"], parts.get("test")


def read_idx(path: Path) -> Array:
    """The numbers of an IDX file, which may be compressed by gzip.

    Raises:
        DataError: it is damaged or of another kind.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in KINDS or not head[3]:
                raise DataError(f"{path} is no IDX file: it begins with {head!r}")
            shape = np.frombuffer(file.read(4 * head[3]), ">u4").tolist()
            kind = np.dtype(KINDS[head[2]])
            size = math.prod(shape) * kind.itemsize
            content = file.read(size + 1)
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an IDX file: {error or type(error).__name__}") from error
    if len(shape) != head[3] or len(content) != size:
        raise DataError(
            f"{path} is damaged: it should hold {size} bytes of numbers of shape {tuple(shape)}, and holds "
            f"{'more' if len(content) > size else len(content)}"
        )
    return np.frombuffer(content, kind).reshape(shape).astype(kind.newbyteorder("="))
