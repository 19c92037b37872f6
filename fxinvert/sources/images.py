"""A folder of class folders of images, read batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.sources.options import DataOptions
from fxinvert.sources.pictures import SUFFIXES, Pictures


class ImageFolder:
    """Batches of (images float (B, C, H, W) in [0, 1], classes int64 (B,)); can be iterated any number of times.

    Opening it reads names and the first image, which decides whether all are read as grey (1 channel) or RGB. The
    class numbers are the positions of the class folders' names, sorted.

    Args:
        path: holds one folder per class, each holding images.
        options: how they are read.
        classes: the class names in the order of their numbers, where another folder has set it.

    Raises:
        DataError: there are no class folders, one is empty or unknown, or, on iteration, an image is damaged or of
            another size than the first.
    """

    def __init__(self, path: Path, options: DataOptions, classes: tuple[str, ...] | None = None) -> None:
        self.path, self.options = path, options
        folders = _folders(path)
        self.classes = classes or tuple(folder.name for folder in folders)
        unknown = [folder.name for folder in folders if folder.name not in self.classes]
        if unknown:
            raise DataError(f"{path} has the class {unknown[0]!r}; known are {', '.join(self.classes)}")
        number = {name: i for i, name in enumerate(self.classes)}
        self._files = [(file, number[folder.name]) for folder in folders for file in _images(folder)]
        self._order = options.order(len(self._files))
        self._pictures = Pictures(self._files[0][0], options.resize)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.split(self._order, self.options.batch_size):
            chosen = [self._files[i] for i in rows.tolist()]
            images = torch.stack([self._pictures.tensor(file) for file, _ in chosen])
            classes = torch.tensor([number for _, number in chosen])
            yield self.options.normalized(images, str(self.path)), classes

    def __len__(self) -> int:
        return math.ceil(len(self._files) / self.options.batch_size)


def _folders(path: Path) -> list[Path]:
    folders = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    if not folders:
        raise DataError(
            f"{path} holds no class folders; images are expected as {path / 'class_name' / 'image.png'}"
        )
    return folders


def _images(folder: Path) -> list[Path]:
    files = sorted(
        item
        for item in folder.iterdir()
        if item.suffix.lower() in SUFFIXES and item.is_file() and not item.name.startswith(".")
    )
    if not files:
        inner = sorted(item.name for item in folder.iterdir() if item.is_dir())
        hint = f"; it holds folders ({', '.join(inner[:3])}): is {folder} the one to name?" if inner else ""
        raise DataError(f"the class folder {folder} holds no images ({', '.join(SUFFIXES[:4])}, …){hint}")
    return files
