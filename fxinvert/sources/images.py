"""A folder of class folders of images, read batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.sources.options import DataOptions

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
GREY_MODES = ("1", "L", "LA", "I", "F")


class ImageFolder:
    """Batches of (images float (B, C, H, W) in [0, 1], classes int64 (B,)); can be iterated any number of times.

    Opening it reads names only. The class numbers are the positions of the class folders' names, sorted. The first
    image decides whether all are read as grey (1 channel) or RGB.

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
        first = self._open(self._files[0][0])
        self._grey = _is_grey(first)
        self._size = options.resize or (first.height, first.width)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.split(self._order, self.options.batch_size):
            chosen = [self._files[i] for i in rows.tolist()]
            images = torch.stack([self._tensor(file) for file, _ in chosen])
            classes = torch.tensor([number for _, number in chosen])
            yield self.options.normalized(images, str(self.path)), classes

    def __len__(self) -> int:
        return math.ceil(len(self._files) / self.options.batch_size)

    def _open(self, file: Path) -> Image.Image:
        try:
            with Image.open(file) as image:
                image.load()
                upright: Image.Image = ImageOps.exif_transpose(image)
                return upright
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            raise DataError(f"the image {file} cannot be read: {error}") from error

    def _tensor(self, file: Path) -> Tensor:
        image = self._open(file)
        if self.options.resize is None and (image.height, image.width) != self._size:
            raise DataError(
                f"the image {file} is {image.height}x{image.width}, {self._files[0][0]} is "
                f"{self._size[0]}x{self._size[1]}; pass --resize to bring all to one size"
            )
        tensor = torch.from_numpy(_pixels(image, self._grey, self._size)).to(torch.get_default_dtype())
        planes = tensor.movedim(-1, 0) if tensor.dim() == 3 else tensor[None]
        return planes if self._grey or len(planes) == 3 else planes.expand(3, -1, -1)


def _pixels(image: Image.Image, grey: bool, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """An image as float32 in [0, 1], (H, W) or (H, W, 3), brought to a size."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them
        image = Image.fromarray(np.asarray(image, dtype=np.float32) / 65535)
    elif image.mode != "F":
        image = image.convert("L" if grey else "RGB")
    if (image.height, image.width) != size:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.array(image, dtype=np.float32) / (1 if image.mode == "F" else 255)


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


def _is_grey(image: Image.Image) -> bool:
    return image.mode in GREY_MODES or image.mode.startswith("I;")
