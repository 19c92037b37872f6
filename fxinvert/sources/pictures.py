"""Image files, read to one size and one number of channels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fxinvert.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
GREY_MODES = ("1", "L", "LA", "I", "F")

Pixels = np.ndarray[Any, Any]


class Pictures:
    """Reads images as the first one is: grey (1 channel) or RGB, and of its size unless another is given.

    Args:
        first: the image that decides.
        resize: (height, width) that all are brought to; None: they must have the size of the first.

    Raises:
        DataError: the first image cannot be read.
    """

    def __init__(self, first: str | Path | Image.Image, resize: tuple[int, int] | None = None) -> None:
        image = opened(first)
        self.first, self.resize = _name(first), resize
        self.grey = image.mode in GREY_MODES or image.mode.startswith("I;")
        self.size = resize or (image.height, image.width)

    def tensor(self, source: str | Path | Image.Image) -> Tensor:
        """One image, float (C, H, W) in [0, 1].

        Raises:
            DataError: it cannot be read, or has another size than the first.
        """
        image = opened(source)
        if self.resize is None and (image.height, image.width) != self.size:
            raise DataError(
                f"the image {_name(source)} is {image.height}x{image.width}, {self.first} is "
                f"{self.size[0]}x{self.size[1]}; pass --resize to bring all to one size"
            )
        tensor = torch.from_numpy(_pixels(image, self.grey, self.size)).to(torch.get_default_dtype())
        planes = tensor.movedim(-1, 0) if tensor.dim() == 3 else tensor[None]
        return planes if self.grey or len(planes) == 3 else planes.expand(3, -1, -1)


def opened(source: str | Path | Image.Image) -> Image.Image:
    """An image, decoded and upright.

    Raises:
        DataError: it is damaged, no image, or so large that Pillow takes it for an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            with image if image is not source else image.copy() as own:
                own.load()
                upright: Image.Image = ImageOps.exif_transpose(own)
                return upright
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise DataError(f"the image {_name(source)} cannot be read: {error}") from error


def _name(source: str | Path | Image.Image) -> str:
    return f"of {source.height}x{source.width}" if isinstance(source, Image.Image) else str(source)


def _pixels(image: Image.Image, grey: bool, size: tuple[int, int]) -> Pixels:
    """An image as float32 in [0, 1], (H, W) or (H, W, 3), brought to a size."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them
        image = Image.fromarray(np.asarray(image, dtype=np.float32) / 65535)
    elif image.mode != "F":
        image = image.convert("L" if grey else "RGB")
    if (image.height, image.width) != size:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.array(image, dtype=np.float32) / (1 if image.mode == "F" else 255)
